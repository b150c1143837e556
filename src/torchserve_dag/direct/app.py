"""One request over HTTP: which model, what of its body, the answer or its chunks, and a client that leaves.

It is an ASGI application, so that a well-kept server has the network side (`http.py`).
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, unquote

from torchserve_dag.direct.entrance import AnswerChunk, Entrance, InFlight
from torchserve_dag.direct.forms import FormError, is_form, parts_of
from torchserve_dag.runtime.worker.protocol import Part, ServiceRequest, ServiceResponse

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

Find = Callable[[str, str | None], Entrance | None]
"""The model of a name and, if a client names one, of a version; None if there is none."""

WATCH_AFTER_S = 0.02
"""How long an answer may take before the client is watched, so that a short request has no task for that."""
MAX_ID = 128
"""The most characters of a client's request id; a longer one is replaced, as under TorchServe."""
_PREDICTIONS = "/predictions/"
_NOTHING_HERE = (HTTPStatus.NOT_FOUND, "ResourceNotFoundException", "There is nothing at this path.")
_METHODS = frozenset({"POST", "PUT", "GET"})


class _RefusedError(Exception):
    """A request that no model sees."""

    def __init__(self, status: HTTPStatus, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class _LeftError(Exception):
    """The client has left before its body was complete."""


class DirectApp:
    """Serves `/predictions/NAME[/VERSION]` and `/ping`, as TorchServe's inference port does."""

    def __init__(self, find: Find, max_body: int, why_not_ready: Callable[[], str] = lambda: "") -> None:
        """`max_body` is in bytes; `why_not_ready` gives the reason for which `/ping` says that it cannot serve."""
        self._find, self._max_body, self._why_not_ready = find, max_body, why_not_ready

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        named = headers.get("x-request-id", "")
        request_id = named if 0 < len(named) <= MAX_ID and named.isascii() and named.isprintable() else uuid.uuid4().hex
        try:
            if path == "/ping":
                await _respond(send, self._health(), request_id)
            elif path.startswith(_PREDICTIONS):
                await self._predict(scope, headers, request_id, receive, send)
            else:
                await _respond(send, _failure(*_NOTHING_HERE, request_id), request_id)
        except _RefusedError as refused:
            await _respond(send, _failure(refused.status, refused.kind, str(refused), request_id), request_id)
        except _LeftError:
            return

    def _health(self) -> ServiceResponse:
        why = self._why_not_ready()
        said = {"status": "Unhealthy", "why": why} if why else {"status": "Healthy"}
        return ServiceResponse(json.dumps(said).encode(), status=503 if why else 200)

    async def _predict(
        self, scope: Message, headers: dict[str, str], request_id: str, receive: Receive, send: Send
    ) -> None:
        entrance = self._entrance(scope)
        if scope["method"] not in _METHODS:
            message = "A prediction is a POST, a PUT or a GET."
            raise _RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, "MethodNotAllowedException", message)
        body = await self._body(headers, receive)
        request = _request(scope, headers, request_id, body)
        if "x-cancel" in headers:
            cancelled = entrance.service.cancel(headers["x-cancel"])
            await _respond(send, ServiceResponse(json.dumps({"cancelled": cancelled}).encode()), request_id)
            return
        in_flight = entrance.submit(request, in_chunks=entrance.service.streams)
        loop = asyncio.get_running_loop()
        watching: list[asyncio.Task[None]] = []
        timer = loop.call_later(
            WATCH_AFTER_S, lambda: watching.append(loop.create_task(_cancel_when_left(receive, in_flight)))
        )
        try:
            await _send_answer(send, in_flight, request_id)
        finally:
            timer.cancel()
            for task in watching:
                task.cancel()

    def _entrance(self, scope: Message) -> Entrance:
        raw: bytes = scope.get("raw_path") or scope["path"].encode()
        name, _, rest = raw.partition(b"?")[0].decode("latin-1").removeprefix(_PREDICTIONS).partition("/")
        version = rest.partition("/")[0]
        name, version = unquote(name), unquote(version)
        entrance = self._find(name, version or None)
        if entrance is None:
            what = f"version {version[:100]} of {name[:100]}" if version else name[:100]
            raise _RefusedError(HTTPStatus.NOT_FOUND, "ModelNotFoundException", f"Model not found: {what}")
        return entrance

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_body:
            raise self._too_large()
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _LeftError
            body += message.get("body", b"")
            if len(body) > self._max_body:
                raise self._too_large()
            more = message.get("more_body", False)
        return bytes(body)

    def _too_large(self) -> _RefusedError:
        message = f"The body is larger than {self._max_body:,} bytes, the max_request_size of config.properties."
        return _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "TooLarge", message)


def _request(scope: Message, headers: dict[str, str], request_id: str, body: bytes) -> ServiceRequest:
    """Raises _RefusedError."""
    content_type, encoding = headers.get("content-type"), headers.get("content-encoding")
    parameters = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
    parts: list[Part] | None = None
    repeated: tuple[str, ...] = ()
    if is_form(content_type):
        if (encoding or "identity").strip().lower() != "identity":
            message = "A form in parts cannot be compressed: send it without Content-Encoding."
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "BadRequestException", message)
        try:
            every = parts_of(body, content_type or "")
        except FormError as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "InputError", str(error)) from None
        last = {part.name: part for part in every}
        repeated = tuple(name for name in last if sum(part.name == name for part in every) > 1)
        body, parts, content_type = b"", list(last.values()), None
    return ServiceRequest(
        request_id,
        body,
        content_type,
        encoding,
        parameters,
        headers,
        parts,
        repeated,
        headers,
    )


async def _cancel_when_left(receive: Receive, in_flight: InFlight) -> None:
    with suppress(asyncio.CancelledError):
        while (await receive())["type"] != "http.disconnect":
            pass
        in_flight.cancel()


async def _send_answer(send: Send, in_flight: InFlight, request_id: str) -> None:
    """The whole answer; or its chunks, each as soon as it is there, and then the rest."""
    item = await in_flight.next()
    if isinstance(item, ServiceResponse):
        await _respond(send, item, request_id)
        return
    headers = [(b"content-type", item.content_type.encode("latin-1")), (b"x-request-id", request_id.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while isinstance(item, AnswerChunk):
        await send({"type": "http.response.body", "body": item.body, "more_body": True})
        item = await in_flight.next()
    await send({"type": "http.response.body", "body": item.body})


async def _respond(send: Send, response: ServiceResponse, request_id: str) -> None:
    headers = [
        (b"content-type", response.content_type.encode("latin-1")),
        (b"content-length", str(len(response.body)).encode()),
        (b"x-request-id", request_id.encode()),
        *((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in response.headers.items()),
    ]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})


def _failure(status: HTTPStatus, kind: str, message: str, request_id: str) -> ServiceResponse:
    """A failure in the form of the models' own."""
    fields = {"code": int(status), "type": kind, "message": message, "request_id": request_id}
    return ServiceResponse(json.dumps(fields).encode(), status=int(status))
