"""What hostile clients do to a language model through the front door and `/v1`, and what comes back.

    python loadtests/language_attacks.py                 all of them, some minutes
    python loadtests/language_attacks.py --only unread,cancelled

It starts a server of its own on the direct host, on free ports of this machine, with the tests' small Llama in the
engine openvino. A line is printed for each attack; the exit status is 1 if one of them is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import ssl
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402 (this file may be run by its path)

from loadtests import small_project  # noqa: E402
from loadtests.hostile import END, Target  # noqa: E402
from loadtests.language_client import Answer, Connection, Place, chat, connect  # noqa: E402
from loadtests.language_server import NAME, LanguageServer, serving, until, weights_for  # noqa: E402

CONTEXT = 2048
WITHIN_S = 120.0
"""The longest wait for what must come."""
SOON_S = 10.0
"""The longest that a refusal may take; far more than it does, for other work on the machine."""
UNREAD, CANCELLED = 200, 1_000
UNREAD_S = 20.0
RECEIVED = 4096
"""Bytes of an unread answer that the client's kernel holds."""
GROWTH_MB = 300.0
"""The most that 200 unread streams may add to the memory of a process."""
FREE_S = 1.0
"""How long places may stay taken once their clients have left."""
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
GOOD = "Hello"


class WrongError(Exception):
    """An attack had an effect that it must not have."""


Attack = Callable[[LanguageServer], str]
ATTACKS: dict[str, tuple[str, Attack, bool]] = {}


def attack(line: str, *, wide: bool = False) -> Callable[[Attack], Attack]:
    """An attack by the name of its function, with what it does in a line. It returns what came back, or raises. A
    `wide` one is for a model whose limit of tokens in flight lets all its streams in.
    """

    def add(function: Attack) -> Attack:
        ATTACKS[function.__name__] = (line, function, wide)
        return function

    return add


def check(what: object, wrong: str) -> None:
    if not what:
        raise WrongError(wrong)


# One request each.


def post(server: LanguageServer, body: bytes | dict[str, Any]) -> tuple[int, Any, float]:
    """The status, the JSON and the seconds of an answer. Raises WrongError if none comes, or it is no JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {server.token}", "content-type": "application/json"}
    trust = ssl.create_default_context(cafile=server.certificate)
    began = time.monotonic()
    url = f"https://localhost:{server.port}/v1/chat/completions"
    with httpx.Client(verify=trust, timeout=WITHIN_S, trust_env=False) as http:
        try:
            answer = http.post(url, content=content, headers=headers)
            return answer.status_code, answer.json(), time.monotonic() - began
        except (httpx.HTTPError, ValueError) as error:
            raise WrongError(f"no answer in JSON: {type(error).__name__}: {error}") from None


def refused(server: LanguageServer, body: bytes | dict[str, Any], *statuses: int) -> str:
    """What a request is refused with, which has to be one of the statuses, in OpenAI's form, and soon."""
    status, said, took = post(server, body)
    check(status in statuses, f"{status}, not {statuses}: {json.dumps(said)[:200]}")
    check(set(said.get("error", {})) == {"message", "type", "param", "code"}, f"not OpenAI's form: {said}")
    check(took < SOON_S, f"it took {took:.1f} s")
    return f"{status} after {took:.2f} s: {said['error']['message'][:110]}"


def request(text: str = GOOD, max_tokens: int = 8, **more: Any) -> dict[str, Any]:
    return {"model": NAME, **chat(text, max_tokens, **more)}


@attack("a prompt of a million characters")
def million(server: LanguageServer) -> str:
    words = [request("a" * 1_000_000), request("fox " * 250_000), request("\U0001f98a" * 1_000_000)]
    return "; ".join(refused(server, body, 413) for body in words)


@attack("bodies that are not UTF-8, and half of a surrogate pair")
def not_utf8(server: LanguageServer) -> str:
    broken = json.dumps(request("HERE")).encode()
    found = [refused(server, broken.replace(b"HERE", bad), 400) for bad in (b"\xff\xfe", b"\xc3", b"\xed\xa0\x80")]
    status, said, _ = post(server, broken.replace(b"HERE", b"\\ud800"))
    check(status in {200, 400}, f"half a pair: {status} {said}")
    return f"{found[0]}; half a pair: {status} {said.get('error', {}).get('message', '')[:80]}"


@attack("10,000 stop strings")
def stops(server: LanguageServer) -> str:
    found = refused(server, request(stop=[f"stop {number}" for number in range(10_000)]), 400)
    status, said, took = post(server, request(stop=["x" * 1_000_000]))
    check(status in {200, 400}, f"one of a million characters: {status} {said}")
    return f"{found}; one of a million characters: {status} after {took:.2f} s"


@attack("temperature NaN, Infinity, 1e999, and as a string")
def temperature(server: LanguageServer) -> str:
    found = []
    for value in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b'"NaN"', b"-1", b"2.1"):
        body = json.dumps(request()).encode().replace(b'"temperature": 0', b'"temperature": ' + value)
        found.append(refused(server, body, 400))
    return found[0]


@attack("schemas that recurse, in themselves and without end")
def schemas(server: LanguageServer) -> str:
    tree = {"type": "object", "properties": {"child": {"$ref": "#"}}, "required": ["child"]}
    nodes = {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}}
    tried: dict[str, Any] = {
        "endless": tree,
        "itself": {"$ref": "#"},
        "in a circle": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        "a list": {"$ref": "#/$defs/node", "$defs": nodes},
        "20,000 properties": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(20_000)}},
    }
    found = []
    for name, schema in tried.items():
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        status, said, took = post(server, request(response_format=form))
        check(status in {200, 400}, f"{name}: {status} {said}")
        check(took < WITHIN_S / 2, f"{name}: it took {took:.1f} s")
        found.append(f"{name}: {status} {said.get('error', {}).get('message', '')[:60]}")
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": "HERE"}}
    deep = json.dumps(request(response_format=form))
    for depth in (500, 100_000):
        nested = '{"items":' * depth + "{}" + "}" * depth
        found.append(f"{depth:,} deep: " + refused(server, deep.replace('"HERE"', nested).encode(), 400))
    return "; ".join(found)


@attack("a call of a tool that never closes")
def open_call(server: LanguageServer) -> str:
    text = '<tool_call>{"name": "weather", "arguments": {"city": "' + "a" * 3_000
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"const": text}}}
    status, said, took = post(server, request(max_tokens=400, tools=[TOOL], response_format=form))
    check(status == httpx.codes.OK, f"{status} {said}")
    (choice,) = said["choices"]
    content = choice["message"]["content"] or ""
    check(choice["finish_reason"] == "length", f"it ended with {choice['finish_reason']}")
    check("<tool_call>" in content, f"what was written is lost: {json.dumps(choice)[:200]}")
    return f"200 after {took:.1f} s: {choice['finish_reason']}, {len(content)} characters of content, no call"


@attack("max_tokens of 10⁹, 10³⁰, 0, -1 and 1.5")
def max_tokens(server: LanguageServer) -> str:
    status, said, took = post(server, request(max_tokens=10**9))
    check(status == httpx.codes.OK, f"{status} {said}")
    used = said["usage"]
    check(used["total_tokens"] <= CONTEXT, f"more than the context: {used}")
    endless = post(server, request(max_tokens=10**30))
    check(endless[0] in {200, 400}, f"10³⁰: {endless[:2]}")
    for value in (0, -1, 1.5):
        refused(server, request() | {"max_tokens": value}, 400)
    reason = said["choices"][0]["finish_reason"]
    return f"200 after {took:.1f} s: {used['total_tokens']:,} tokens, {reason}; 10³⁰: {endless[0]}; else 400"


# Streams.


async def good(server: LanguageServer, limit_s: float = WITHIN_S, place: Place | None = None) -> Answer:
    """A good client's short answer."""
    place = place or server.at_door()
    connection = await connect(place)
    answer = await connection.ask(place, chat(GOOD, 8), limit_s)
    connection.transport.abort()
    return answer


@attack("the worker killed with SIGKILL in mid-stream")
def killed(server: LanguageServer) -> str:
    return asyncio.run(_killed(server))


async def _killed(server: LanguageServer) -> str:
    place = server.at_door()
    streams = [await connect(place) for _ in range(8)]
    begun = [asyncio.Event() for _ in streams]
    endings = []
    for stream, event in zip(streams, begun, strict=True):
        stream.on_chunk = event.set
        endings.append(stream.send(place, chat("Tell me a story.", 1_900)))
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), WITHIN_S)
    before = server.worker().record.pid
    server.worker().kill()
    at = time.perf_counter()
    done, late = await asyncio.wait(endings, timeout=WITHIN_S)
    took = time.perf_counter() - at
    check(not late, f"{len(late)} of {len(endings)} streams hang")
    for stream in streams:
        check(stream.answer.error.startswith("200: "), f"a silent end: {stream.answer.error or stream.answer.reason}")
    failed: Counter[str] = Counter()
    while not (answer := await good(server)).ok:
        check(time.perf_counter() - at < WITHIN_S, f"no answer again within {WITHIN_S:g} s: {answer.error}")
        failed[answer.error[:4]] += 1
        await asyncio.sleep(0.1)
    again = time.perf_counter() - at
    check(server.worker().record.pid != before, "it is the same worker")
    said = streams[0].answer.error
    found = f"{len(done)} error events after {took:.2f} s: {said}; "
    return found + f"served again after {again:.1f} s, till then {dict(failed)}"


@attack(f"{UNREAD} streams that read nothing")
def unread(server: LanguageServer) -> str:
    before = server.memory_mb()
    body = json.dumps(request("Tell me a story.", CONTEXT) | {"stream": True}).encode()
    target = Target("127.0.0.1", server.port, server.token)
    length = f"Content-Length: {len(body)}"
    sent = target.head(server.at_door().path, "Content-Type: application/json", length) + END + body
    poor = server.at_door(small_project.tool(server.root, "token", "new", "other").strip())
    with ExitStack() as held:
        for _ in range(UNREAD):
            connection = target.connect()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVED)
            held.enter_context(target.wrap(connection, "http/1.1")).sendall(sent)
        peak: Counter[str] = Counter()
        others: list[Answer] = []
        end = time.monotonic() + UNREAD_S
        while time.monotonic() < end:
            others.append(asyncio.run(good(server, SOON_S, poor)))
            peak = Counter({name: max(size, peak[name]) for name, size in server.memory_mb().items()})
            time.sleep(0.2)
    waits = sorted(answer.first_s for answer in others if answer.ok)
    errors = Counter(answer.error[:60] for answer in others if not answer.ok)
    found = ", ".join(f"{name} {before[name]:.0f} → {size:.0f} MB" for name, size in peak.items())
    found += f"; others: {len(waits)} served"
    found += f", first token p50 {waits[len(waits) // 2]:.2f} s" if waits else ""
    check(max(size - before[name] for name, size in peak.items()) < GROWTH_MB, f"memory: {found}")
    check(not errors, f"others are not served: {dict(errors)}; {found}")
    return found


@attack(f"{CANCELLED:,} streams cancelled at once", wide=True)
def cancelled(server: LanguageServer) -> str:
    return asyncio.run(_cancelled(server))


async def _cancelled(server: LanguageServer) -> str:
    place = server.at_door()
    streams: list[Connection] = []
    for _ in range(CANCELLED // 50):
        streams += await asyncio.gather(*(connect(place) for _ in range(50)))
    for stream in streams:
        stream.send(place, chat("Tell me a story.", 1_900))
    await asyncio.sleep(5)
    state = server.worker().ask("state") or {}
    began = sum(bool(stream.answer.times) for stream in streams)
    refusals = Counter(stream.answer.error[:60] for stream in streams if stream.answer.error)
    for stream in streams:
        stream.transport.abort()
    at = time.perf_counter()
    answer = await good(server)
    empty = await asyncio.to_thread(until, lambda: (server.worker().ask("state") or {}).get("inside") == 0, WITHIN_S)
    took = time.perf_counter() - at
    found = f"{began} were running, {state.get('inside')} inside, refused {dict(refusals)}; "
    found += f"the next one's first token after {answer.first_s if answer.ok else 0:.2f} s, all free after {took:.2f} s"
    check(answer.ok, f"the next one: {answer.error}; {found}")
    check(empty is not None, f"places stay taken; {found}")
    check(answer.first_s < FREE_S, found)
    return found


@attack("1,000 requests for 10⁹ tokens by a token with 1,000 a minute")
def over_limit(server: LanguageServer) -> str:
    token = small_project.tool(server.root, "token", "new", "poor", "--tokens-per-minute", "1000").strip()
    place = server.at_door(token)
    return asyncio.run(_over_limit(place, 10**9))


async def _over_limit(place: Place, most: int) -> str:
    connections = [await connect(place) for _ in range(20)]
    found: Counter[str] = Counter()

    async def client(connection: Connection) -> None:
        for _ in range(50):
            answer = await connection.ask(place, chat(GOOD, most))
            found[answer.error[:4] or "200"] += 1

    began = time.perf_counter()
    await asyncio.gather(*map(client, connections))
    check(set(found) == {"429:"}, f"{dict(found)}")
    return f"{dict(found)} in {time.perf_counter() - began:.1f} s"


def run(server: LanguageServer, name: str) -> bool:
    """Print what became of an attack. Returns whether that is as it should be, and the server still serves."""
    line, function, _ = ATTACKS[name]
    try:
        found, right = function(server), True
        answer = asyncio.run(good(server))
        if not answer.ok:
            found, right = f"afterwards a good client gets: {answer.error}", False
    except (WrongError, OSError, TimeoutError) as error:
        found, right = str(error) or type(error).__name__, False
    print(f"{'ok   ' if right else 'WRONG'} {line}: {found}", flush=True)  # noqa: T201 (for a person)
    return right


def on_a_server(names: list[str], settings: dict[str, Any]) -> list[str]:
    """Run these attacks. Returns those that are wrong."""
    with tempfile.TemporaryDirectory() as folder:
        weights = weights_for("openvino", "tiny", Path(folder))
        (root := Path(folder) / "project").mkdir()
        every = {"engine": "openvino", "room": 16, "context": CONTEXT, **settings}
        with serving(root, weights, every, max_inside=2 * CANCELLED) as server:
            return [name for name in names if not run(server, name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"names, separated by commas: {', '.join(ATTACKS)}")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(ATTACKS)
    if unknown := [name for name in names if name not in ATTACKS]:
        parser.error(f"no attack {', '.join(unknown)}; known: {', '.join(ATTACKS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the server is stopped
    wrong: list[str] = []
    for wide in (False, True):
        if those := [name for name in names if ATTACKS[name][2] == wide]:
            wrong += on_a_server(those, {"tokens_in_flight": CANCELLED * CONTEXT} if wide else {})
    sys.exit(f"wrong: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
