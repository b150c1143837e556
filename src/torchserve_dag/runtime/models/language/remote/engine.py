"""The engine `remote`: a model of any server that speaks OpenAI's API, with limits, retries, and no silent end."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.handler import EngineLoad, Reply
from torchserve_dag.runtime.messages import Chat, OverloadedError, Prompt, TextChunk, Usage
from torchserve_dag.runtime.models.language.answer_loop import AnswerLoop
from torchserve_dag.runtime.models.language.engine import Cancel
from torchserve_dag.runtime.models.language.openai_json import (
    DONE,
    MOST_EVENT_BYTES,
    ChunkReader,
    EventReader,
    UpstreamError,
    body_of,
    failure_of,
    parse,
    path_of,
)
from torchserve_dag.runtime.models.language.remote.address import address_of, client_of, key_of
from torchserve_dag.runtime.models.language.remote.allowance import Allowance
from torchserve_dag.runtime.models.language.settings import LanguageSettings

if TYPE_CHECKING:
    import httpx

    from torchserve_dag.runtime.compute.placement import Placement  # it imports torch

CONTEXT = 131_072
"""Where the settings name none: the server refuses what is too long for its model."""
BYTES_PER_TOKEN, TOKENS_PER_MESSAGE, TOKENS_PER_PHOTO = 4, 4, 1_000
"""Of the estimate of a prompt's tokens."""
MOST_WAITING = 1_000
"""Requests that wait for a place."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
"""Between two attempts; each pause is twice the one before, and by chance up to a half shorter or longer."""
DRAIN_S = 0.1
"""How long the end of a stream may follow its last event, for its connection to be used again."""


class RemoteEngine:
    """A server's model. All requests are tasks of one thread's event loop, so that many streams cost little."""

    supports = frozenset(field.name for kind in (Chat, Prompt) for field in dataclasses.fields(kind)) | {"photos"}
    """Everything: the server refuses what it cannot do."""

    def __init__(self, settings: LanguageSettings) -> None:
        """Raises ValueError for an address, or a key, that cannot be."""
        if settings.remote is None:
            raise ValueError('the engine remote needs "remote", which says where the server is')
        self._settings, self._remote = settings, settings.remote
        self._key = key_of(self._remote.key)
        self._url = address_of(self._remote.url, secret=bool(self._key))
        self.room = settings.room
        self.context = settings.context or CONTEXT
        self._allowance = Allowance(self._remote)
        self._client = client_of(self._remote, self._key, self.room)
        self._places = asyncio.Semaphore(self.room)
        self._in_progress = AnswerLoop("remote-engine")

    def count(self, request: Chat | Prompt) -> int:
        """An estimate, for the tokenizer is the server's: a token for four bytes of text."""
        if isinstance(request, Prompt):
            return len(request.prompt.encode(errors="replace")) // BYTES_PER_TOKEN + 1
        parts = [part for m in request.messages if isinstance(m.content, list) for part in m.content]
        photos = sum(part.image_url is not None for part in parts)
        text = "".join(message.text for message in request.messages)
        others = [plain.flatten(request.tools or []), [plain.flatten(m.tool_calls or []) for m in request.messages]]
        size = len(text.encode(errors="replace")) + len(json.dumps(others))
        return size // BYTES_PER_TOKEN + TOKENS_PER_MESSAGE * len(request.messages) + TOKENS_PER_PHOTO * photos

    def start(self, request: Chat | Prompt, most_tokens: int, reply: Reply[TextChunk]) -> Cancel:
        """See LanguageEngine. Raises InputError with 429 for what the limits of tokens and money do not allow."""
        name = f"{self._settings.model}:{request.adapter}" if request.adapter else self._settings.model
        body = json.dumps(self._settings.options | body_of(request, name, most_tokens, self._remote.limit))
        answers, prompt = request.n or 1, self.count(request)
        settle = self._allowance.reserve(prompt, answers * most_tokens)
        asked = _Asked(f"{self._url}/{path_of(request)}", body, prompt, answers, reply)
        try:
            most = self.room + MOST_WAITING
            return self._in_progress.start(self._answer(asked), reply, most, lambda: settle(asked.cost()))
        except OverloadedError:
            settle(Usage())
            raise

    def load_now(self) -> EngineLoad:
        there = len(self._in_progress)
        return EngineLoad(running=min(there, self.room), waiting=max(there - self.room, 0))

    def hangs(self) -> bool:
        """Each wait for the server has its own limit, so only the loop itself could."""
        return not self._in_progress.runs

    def close(self) -> None:
        self._in_progress.close(self._client.aclose)

    async def _answer(self, asked: _Asked) -> None:
        """Ask, and ask again as long as that may help and nothing of an answer has been given."""
        async with self._places:
            for attempt in range(self._remote.retries + 1):
                try:
                    await self._attempt(asked)
                except AttemptError as failed:
                    pause = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S)
                    pause = max(pause * random.uniform(0.5, 1.5), failed.after_s)  # noqa: S311 (no secret)
                    last = attempt == self._remote.retries or asked.begun or not failed.again
                    if last or failed.after_s > self._remote.timeout_s:
                        raise failed.error from failed
                else:
                    return
                await asyncio.sleep(pause)

    async def _attempt(self, asked: _Asked) -> None:
        """Ask once, and give the chunks as they come. Raises AttemptError."""
        import httpx  # noqa: PLC0415 (only this engine needs it)

        try:
            with _Patience(self._remote.timeout_s) as patience:
                async with aclosing(self._events(asked, patience)) as events:
                    async for event in events:
                        asked.give(asked.reader.read(event))
            asked.give(asked.reader.end(asked.prompt))
        except UpstreamError as error:
            again = error.status >= HTTPStatus.INTERNAL_SERVER_ERROR or error.status == HTTPStatus.TOO_MANY_REQUESTS
            raise AttemptError(self._redacted(error), again=again) from error
        except asyncio.TimeoutError:
            asked.accepted = True  # for all we know
            message = f"The model's server sent nothing for {self._remote.timeout_s:g} seconds."
            raise AttemptError(UpstreamError(message, HTTPStatus.GATEWAY_TIMEOUT), again=False) from None
        except httpx.HTTPError as error:
            what = "stopped in the middle of its answer" if asked.accepted else "cannot be reached"
            message = f"The model's server {what} ({type(error).__name__})."
            raise AttemptError(UpstreamError(message), again=True) from error
        finally:
            asked.count_attempt()

    async def _events(self, asked: _Asked, patience: _Patience) -> AsyncGenerator[dict[str, Any], None]:
        """The events of the server's answer, or its whole answer as one. Raises UpstreamError, AttemptError,
        asyncio.TimeoutError, and httpx's errors.
        """
        request = self._client.build_request("POST", asked.url, content=asked.body)
        response = await self._client.send(request, stream=True)
        try:
            if response.status_code != HTTPStatus.OK:
                raise self._refused(response, await _beginning(response))
            asked.accepted = True
            if "text/event-stream" not in response.headers.get("content-type", ""):
                yield parse(await _beginning(response))
                return
            events, parts = EventReader(), response.aiter_bytes()
            async for part in parts:
                for data in events.read(part):
                    if data == DONE:
                        with suppress(asyncio.TimeoutError), _Patience(DRAIN_S):
                            await anext(parts, b"")
                        return
                    patience.renew()
                    yield parse(data)
        finally:
            await response.aclose()

    def _refused(self, response: httpx.Response, text: bytes) -> AttemptError:
        """What the client is told of a status that is no success."""
        status = response.status_code
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            key = self._remote.key
            what = f"the key in the environment variable {key}" if key else "a request without a key: name one in `key`"
            return AttemptError(UpstreamError(f"The model's server refused {what} ({status})."), again=False)
        if status < HTTPStatus.BAD_REQUEST:
            message = f"The model's server answered {status}, and no other address is followed: correct the url."
            return AttemptError(UpstreamError(message), again=False)
        error = self._redacted(failure_of(status, text))
        again = status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR
        return AttemptError(error, again=again, after_s=_retry_after(response.headers.get("retry-after", "")))

    def _redacted(self, error: UpstreamError) -> UpstreamError:
        """A failure without the key, should the server repeat it; a fault of the server's is a 502, 503 or 504 here."""
        kept = {HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT}
        fault = error.status >= HTTPStatus.INTERNAL_SERVER_ERROR and error.status not in kept
        message = error.message.replace(self._key, "…") if self._key else error.message
        return UpstreamError(message, HTTPStatus.BAD_GATEWAY if fault else error.status)


@dataclasses.dataclass(slots=True)
class _Asked:
    """A request that has been accepted."""

    url: str
    body: str
    prompt: int
    """An estimate of the prompt's tokens."""
    answers: int
    reply: Reply[TextChunk]
    reader: ChunkReader = dataclasses.field(init=False)
    """Of the attempt in progress."""
    accepted: bool = False
    """Whether the server has accepted the attempt, and so charges it."""
    begun: bool = False
    """Whether a part of an answer has been given."""
    earlier: Usage = dataclasses.field(default_factory=Usage)
    """What the attempts before this one have cost."""

    def __post_init__(self) -> None:
        self.reader = ChunkReader("remote", self.answers)

    def give(self, chunks: list[TextChunk]) -> None:
        for chunk in chunks:
            self.begun = True
            self.reply.chunk(chunk)

    def cost(self) -> Usage:
        """What the request has cost so far, as far as that is known."""
        if not self.accepted:
            return self.earlier
        return self.earlier + (self.reader.usage or Usage.of(self.prompt, self.reader.pieces))

    def count_attempt(self) -> None:
        """The attempt is over."""
        self.earlier, self.accepted, self.reader = self.cost(), False, ChunkReader("remote", self.answers)


class AttemptError(Exception):
    """An attempt has failed: with what, whether another may help, and how long the server wants us to wait."""

    def __init__(self, error: UpstreamError, *, again: bool, after_s: float = 0.0) -> None:
        super().__init__(error.message)
        self.error, self.again, self.after_s = error, again, after_s


class _Patience:
    """Ends the wait of the task that enters it, some seconds after the last `renew`: raises asyncio.TimeoutError.

    Not `asyncio.wait_for`: before Python 3.12 that loses a cancellation that comes together with what it waits for.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._over = False

    def renew(self) -> None:
        self._end = self._loop.time() + self._seconds

    def __enter__(self) -> _Patience:
        self.renew()
        self._timer = self._loop.call_at(self._end, self._look)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        if self._over and kind is asyncio.CancelledError:
            raise asyncio.TimeoutError

    def _look(self) -> None:
        if self._loop.time() < self._end:
            self._timer = self._loop.call_at(self._end, self._look)
        elif self._task is not None:
            self._over = True
            self._task.cancel()


async def _beginning(response: httpx.Response) -> bytes:
    """A body up to its limit. Raises UpstreamError if it is larger."""
    body = bytearray()
    async for part in response.aiter_bytes():
        body += part
        if len(body) > MOST_EVENT_BYTES:
            raise UpstreamError("The model's server sent an answer of more than 8 MiB.")
    return bytes(body)


def _retry_after(value: str) -> float:
    """Seconds, from a header that has seconds or a date. 0 if it has neither."""
    with suppress(ValueError):
        return max(float(value), 0.0)
    with suppress(ValueError, TypeError, OverflowError):
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return 0.0


def load(_folder: Path, settings: LanguageSettings, _placement: Placement) -> RemoteEngine:
    """The engine for the server that the settings name. Raises ValueError."""
    return RemoteEngine(settings)
