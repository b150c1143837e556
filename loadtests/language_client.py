"""Clients of a language model that cost little: each token of a stream about 20 microseconds of CPU.

    python loadtests/language_client.py

A load is a line of JSON on its standard input, what came of it a line on its standard output.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import httptools
import uvloop

BLANK, DONE = (b"", b"[DONE]")
WORDS = ("river", "clock", "garden", "letter", "bridge", "winter", "violin", "harbour", "lantern", "forest")


@dataclass(frozen=True)
class Place:
    """Where a model is called."""

    name: str
    address: str
    """`unix:PATH`, or HOST:PORT behind TLS."""
    path: str
    certificate: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    """Of each request, beside the chat's own."""


@dataclass
class Answer:
    """One streamed answer. Times are in seconds, of one clock."""

    began: float
    times: list[float] = field(default_factory=list)
    """Of each chunk with text, or with a reason to end: about one a token."""
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reason: str = ""
    """Why it ended; empty if it did not."""
    error: str = ""
    text: str = ""

    @property
    def ok(self) -> bool:
        return bool(self.reason and self.times and not self.error)

    @property
    def first_s(self) -> float:
        return self.times[0] - self.began

    @property
    def per_token_s(self) -> float:
        return (self.times[-1] - self.times[0]) / max(1, self.tokens - 1)


def prompt(number: int) -> str:
    """A prompt that begins like no other, so that no cache of prefixes has it."""
    first, second, third = (WORDS[number // 10**power % len(WORDS)] for power in range(3))
    return f"Number {number}. Write a very long story about a {first}, a {second} and a {third}. Describe every detail."


def answer_length(number: int) -> int:
    """32 to 95 tokens, so that the answers of several clients do not end together."""
    return 32 + number * 37 % 64


def chat(text: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0, **more}


class Connection(asyncio.Protocol):
    """A connection that is kept, for one request at a time."""

    def __init__(self) -> None:
        self.answer = Answer(0.0)
        self.status = 0
        self.headers: dict[str, str] = {}
        self.on_chunk: Callable[[], None] = _nothing
        """Called for each chunk with text."""
        self._left = b""
        self._done: asyncio.Future[None] | None = None
        self._parser: Any = None
        self.transport: Any = None

    def send(self, place: Place, body: dict[str, Any]) -> asyncio.Future[None]:
        """Send a request; what is returned is done at the end of its answer."""
        data = json.dumps({**body, **place.fields}).encode()
        lines = [f"POST {place.path} HTTP/1.1", "host: localhost", "content-type: application/json"]
        lines += [f"content-length: {len(data)}", *(f"{name}: {value}" for name, value in place.headers.items())]
        self._parser, self._left, self.headers = httptools.HttpResponseParser(self), b"", {}
        self._done = asyncio.get_running_loop().create_future()
        self.answer = Answer(time.perf_counter())
        self.transport.write("\r\n".join([*lines, "", ""]).encode("latin-1") + data)
        return self._done

    async def ask(self, place: Place, body: dict[str, Any], limit_s: float = 600.0) -> Answer:
        done = self.send(place, body)
        try:
            await asyncio.wait_for(done, limit_s)
        except TimeoutError:
            self.answer.error = f"no end within {limit_s:g} s"
            self.transport.abort()
        return self.answer

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self._parser:
            self._parser.feed_data(data)

    def connection_lost(self, _: Exception | None) -> None:
        if self._done and not self._done.done():
            self.answer.error = self.answer.error or "the connection was closed"
            self._done.set_result(None)

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        now = time.perf_counter()
        *lines, self._left = (self._left + body).split(b"\n")
        for line in lines:
            self._read(line.removeprefix(b"data: ").strip(), now)

    def on_message_complete(self) -> None:
        self._read(self._left, time.perf_counter())
        answer = self.answer
        if not answer.reason and not answer.error:
            answer.error = f"{self.status}: it ended without a reason"
        if self._done and not self._done.done():
            self._done.set_result(None)

    def _read(self, line: bytes, now: float) -> None:
        """A line of JSON: an event of OpenAI's API, or a TextChunk."""
        if line in {BLANK, DONE}:
            return
        said, answer = json.loads(line), self.answer
        failure = said.get("error") or (said if "message" in said and "code" in said else None)
        if failure:
            answer.error = f"{self.status}: {failure['message']}"
            return
        if usage := said.get("usage"):
            answer.tokens, answer.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            answer.cached_tokens = (usage.get("prompt_tokens_details") or usage).get("cached_tokens") or 0
        chunks = said.get("choices", [said] if "text" in said else [])
        for chunk in chunks:
            text = (chunk["delta"].get("content") if "delta" in chunk else chunk.get("text")) or ""
            answer.text += text
            reason = chunk.get("finish_reason")
            if text or reason:
                answer.times.append(now)
                self.on_chunk()
            answer.reason = reason or answer.reason


def _nothing() -> None: ...


async def connect(place: Place) -> Connection:
    loop = asyncio.get_running_loop()
    if place.address.startswith("unix:"):
        return (await loop.create_unix_connection(Connection, place.address.removeprefix("unix:")))[1]
    host, _, port = place.address.rpartition(":")
    trust = ssl.create_default_context(cafile=place.certificate)
    return (await loop.create_connection(Connection, host, int(port), ssl=trust))[1]


@dataclass(frozen=True)
class Load:
    """So many clients, each of which asks again as soon as it is answered."""

    clients: int
    seconds: float
    warm_up_s: float
    first: int
    """The number of the first prompt: each load has prompts of its own."""
    place: Place | None = None
    """None for a bare loop."""


@dataclass(frozen=True)
class Measured:
    """What came of a load."""

    tokens_per_s: float
    first_s: list[float]
    """Of each answer that began in the window: the time to its first token."""
    per_token_s: list[float]
    """Likewise: the mean time per token after the first."""
    whole_s: list[float]
    """Likewise: the time to its end."""
    answers: int
    errors: list[str]
    tokens: int
    """Of all answers, in the window or not."""
    cpu: float
    """Cores that the client, or the bare loop, was busy on."""


def summary(answers: list[Answer], begin: float, end: float, cpu: float) -> Measured:
    """The window's figures. The tokens of a chunk are its answer's mean, for a chunk may have two tokens, or none."""
    good = [answer for answer in answers if answer.ok]
    within = [answer for answer in good if begin <= answer.began < end]
    tokens = sum(answer.tokens / len(answer.times) for answer in good for when in answer.times if begin <= when < end)
    errors = [answer.error or "it has no end" for answer in answers if not answer.ok]
    total = sum(answer.tokens for answer in answers)
    first, per_token = [answer.first_s for answer in within], [answer.per_token_s for answer in within]
    whole = [answer.times[-1] - answer.began for answer in within]
    speed, busy = tokens / (end - begin), cpu / (end - begin)
    return Measured(speed, first, per_token, whole, len(within), errors[:5], total, busy)


async def run(load: Load) -> Measured:
    """Have the clients ask for the load's time, and wait for the answers in progress."""
    place = load.place
    if place is None:
        raise ValueError("a client needs a place")
    connections = await asyncio.gather(*(connect(place) for _ in range(load.clients)))
    numbers = iter(range(load.first, sys.maxsize))
    answers: list[Answer] = []
    begin = time.perf_counter() + load.warm_up_s
    end = begin + load.seconds

    async def client(connection: Connection) -> None:
        while time.perf_counter() < end:
            number = next(numbers)
            answer = await connection.ask(place, chat(prompt(number), answer_length(number)))
            answers.append(answer)
            if not answer.ok:
                await asyncio.sleep(0.1)

    working = [asyncio.ensure_future(client(connection)) for connection in connections]
    await asyncio.sleep(load.warm_up_s)
    cpu = time.process_time()
    await asyncio.sleep(end - time.perf_counter())
    cpu = time.process_time() - cpu
    await asyncio.gather(*working)
    for connection in connections:
        connection.transport.close()
    return summary(answers, begin, end, cpu)


def loads() -> Iterator[tuple[Load, Callable[[Measured], None]]]:
    """The loads on the standard input, each with what writes its result. Libraries may print: not to where it goes."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(measured: Measured) -> None:
        print(json.dumps(asdict(measured)), file=out, flush=True)

    print("ready", file=out, flush=True)
    for line in sys.stdin:
        said = json.loads(line)
        place = said.pop("place")
        yield Load(**said, place=Place(**place) if place else None), write


if __name__ == "__main__":
    for each, write in loads():
        write(uvloop.run(run(each)))
