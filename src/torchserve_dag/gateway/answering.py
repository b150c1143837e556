"""One request to `/v1`: the calls to the model, the answer as it comes, and what it has cost at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from torchserve_dag.direct.leaving import while_client_stays
from torchserve_dag.gateway import estimate
from torchserve_dag.gateway.calls import ModelCalls
from torchserve_dag.gateway.errors import ApiError
from torchserve_dag.gateway.form import Form, Head
from torchserve_dag.gateway.limits import Reservation
from torchserve_dag.gateway.text import TextAnswer
from torchserve_dag.runtime.messages import Chat, Prompt, TextChunk, Usage
from torchserve_dag.runtime.models.language.choice import put_together

T = TypeVar("T")
EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
AT_ONCE = 16
"""How many prompts of one request are with the model at the same time."""


@dataclass(slots=True)
class Cost:
    """What a request has used so far."""

    calls: int = 0
    """Begun, and accepted by the model."""
    chunks: int = 0
    usage: Usage = field(default_factory=Usage)

    def tokens(self, message: Chat | Prompt) -> int:
        """As the model says; estimated where it does not, or where its answer was left before its end."""
        if not self.calls:
            return 0
        return self.usage.total_tokens or self.calls * estimate.prompt_tokens(message) + self.chunks


class TextResponse(Response):
    """Answers with a model's text. The call to the model begins when this is sent, and ends where the client leaves."""

    def __init__(
        self,
        calls: ModelCalls,
        messages: Sequence[Chat | Prompt],
        form: Form,
        reservation: Reservation | None,
        *,
        stream: bool,
    ) -> None:
        super().__init__()
        self._calls, self._messages, self._form, self._reservation = calls, messages, form, reservation
        self._stream = stream
        self._cost = Cost()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_client_stays(receive, self._answer(scope, receive, send))
        finally:
            self._settle()

    def _settle(self) -> None:
        if self._reservation:
            self._reservation.settle(self._cost.tokens(self._messages[0]))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError for what fails before the answer begins."""
        async with aclosing(self._chunks()) as chunks:
            if self._stream:
                await self._send_events(chunks, send)
                return
            found = [chunk async for some in chunks for chunk in some]
        self._settle()
        whole = self._form.whole(self._head(), put_together(found), self._cost.usage)
        await JSONResponse(whole, headers=self._limits())(scope, receive, send)

    async def _send_events(self, chunks: AsyncIterator[list[TextChunk]], send: Send) -> None:
        nothing: list[TextChunk] = []
        begun = await anext(chunks, nothing)  # what fails before the first chunk has a status of its own
        head = self._head()
        headers = [(name.encode(), value.encode()) for name, value in {**EVENTS, **self._limits()}.items()]
        await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": headers})

        async def write(events: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": events, "more_body": more})

        await write(self._form.chunks(head, begun))
        try:
            async for some in chunks:
                await write(self._form.chunks(head, some))
        except ApiError as error:
            await write(self._form.failed(head, error), more=False)
            return
        self._settle()
        await write(self._form.end(head, self._cost.usage), more=False)

    def _head(self) -> Head:
        return Head(self._calls.request_id, self._calls.answered_by)

    def _limits(self) -> Mapping[str, str]:
        return self._reservation.headers() if self._reservation else {}

    async def _chunks(self) -> AsyncGenerator[list[TextChunk], None]:
        if len(self._messages) == 1:
            async with aclosing(self._one(self._messages[0])) as chunks:
                async for some in chunks:
                    yield some
            return
        n = self._messages[0].n or 1
        sources = [self._numbered(message, at * n) for at, message in enumerate(self._messages)]
        async with aclosing(merged(sources)) as chunks:
            async for some in chunks:
                yield some

    async def _numbered(self, message: Chat | Prompt, first: int) -> AsyncGenerator[list[TextChunk], None]:
        async with aclosing(self._one(message)) as chunks:
            async for some in chunks:
                yield [replace(chunk, index=first + chunk.index) for chunk in some]

    async def _one(self, message: Chat | Prompt) -> AsyncGenerator[list[TextChunk], None]:
        async with self._calls.call(message) as answer:
            text = TextAnswer(answer)
            async with aclosing(text.chunks()) as chunks:
                self._cost.calls += answer.status == HTTPStatus.OK
                async for some in chunks:
                    self._cost.chunks += len(some)
                    yield some
            self._cost.usage += text.usage or Usage()


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """What several sources give, as it comes; the first failure ends all."""
    queue: asyncio.Queue[T | ApiError | None] = asyncio.Queue(AT_ONCE)
    places = asyncio.Semaphore(AT_ONCE)

    async def pass_on(source: AsyncGenerator[T, None]) -> None:
        try:
            async with places, aclosing(source):
                async for item in source:
                    await queue.put(item)
        except ApiError as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.ensure_future(pass_on(source)) for source in sources]
    try:
        for _ in tasks:
            while (item := await queue.get()) is not None:
                if isinstance(item, ApiError):
                    raise item
                yield item
    finally:
        for task in tasks:
            task.cancel()
