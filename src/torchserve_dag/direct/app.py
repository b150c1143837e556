"""One request over HTTP: which model, what of its body, the answer or its chunks, and a client that leaves.

It is an ASGI application, so that a well-kept server has the network side (`http.py`). A gRPC call comes over HTTP,
too: see `grpc.py`.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, unquote

from torchserve_dag.direct import grpc
from torchserve_dag.direct.cancel_keys import with_own_keys
from torchserve_dag.direct.entrance import AnswerChunk, Entrance, InFlight
from torchserve_dag.direct.forms import FormError, is_form, parts_of
from torchserve_dag.direct.leaving import Receive, client_leaves, while_client_stays
from torchserve_dag.direct.open_inference import grpc as open_inference_grpc
from torchserve_dag.direct.open_inference import rest as open_inference
from torchserve_dag.direct.open_inference.calls import OpenInference
from torchserve_dag.direct.open_inference.requests import Caller
from torchserve_dag.direct.open_inference.tensors import InferenceError
from torchserve_dag.direct.writer import GrpcWriter, RestWriter, Send, Writer
from torchserve_dag.runtime.worker.protocol import Part, ServiceRequest, ServiceResponse

Message = MutableMapping[str, Any]

Find = Callable[[str, str | None], Entrance | None]
"""The model of a name and, if a client names one, of a version; None if there is none."""
About = Callable[[str], ServiceResponse | None]
"""What the keeper asks a worker, by the last part of the path `/worker/…`."""

WATCH_AFTER_S = 0.02
"""How long an answer may take before the client is watched, so that a short request has no task for that."""
_PREDICTIONS, _WORKER = "/predictions/", "/worker/"
_METHODS = frozenset({"POST", "PUT", "GET"})
_CALLS = frozenset({"Predictions", "StreamPredictions"})


class _RefusedError(Exception):
    """A request that no model sees."""

    def __init__(self, status: HTTPStatus, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class _LeftError(Exception):
    """The client has left before its body was complete."""


class DirectApp:
    """Serves `/predictions/NAME[/VERSION]` and `/ping`, as TorchServe's inference port does, and its gRPC calls; and
    the Open Inference Protocol, at `/v2` and over gRPC.
    """

    def __init__(
        self,
        find: Find,
        max_body: int,
        why_not_ready: Callable[[], str] = lambda: "",
        about: About = lambda _: None,
    ) -> None:
        """`max_body` is in bytes. `why_not_ready`: for what reason `/ping` says that it cannot serve."""
        self._find, self._max_body, self._why_not_ready, self._about = find, max_body, why_not_ready, about
        self._open_inference = OpenInference(find, why_not_ready)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = grpc.id_in(headers) or uuid.uuid4().hex
        calls = path.startswith((grpc.SERVICE, open_inference_grpc.SERVICE))
        writer = GrpcWriter(send, request_id) if calls else RestWriter(send, request_id)
        try:
            if path.startswith(_PREDICTIONS):
                await self._predict(scope, headers, receive, writer)
            elif path.startswith(grpc.SERVICE):
                await self._call(path.removeprefix(grpc.SERVICE), headers, receive, writer)
            elif path.startswith(open_inference_grpc.SERVICE):
                await self._infer_call(path.removeprefix(open_inference_grpc.SERVICE), headers, receive, writer)
            elif path == open_inference.ROOT or path.startswith(f"{open_inference.ROOT}/"):
                await writer.whole(await self._infer(scope, headers, request_id, receive))
            elif path == "/ping":
                await writer.whole(self._health())
            elif path.startswith(_WORKER) and (found := self._about(path.removeprefix(_WORKER))):
                await writer.whole(found)
            else:
                message = "There is nothing at this path."
                await writer.whole(_failure(HTTPStatus.NOT_FOUND, "ResourceNotFoundException", message, request_id))
        except _RefusedError as refused:
            await writer.whole(_failure(refused.status, refused.kind, str(refused), request_id))
        except _LeftError:
            return

    def _health(self) -> ServiceResponse:
        why = self._why_not_ready()
        said = {"status": "Unhealthy", "why": why} if why else {"status": "Healthy"}
        return ServiceResponse(json.dumps(said).encode(), status=503 if why else 200)

    async def _predict(self, scope: Message, headers: dict[str, str], receive: Receive, writer: Writer) -> None:
        raw: bytes = scope.get("raw_path") or scope["path"].encode()
        name, _, rest = raw.partition(b"?")[0].decode("latin-1").removeprefix(_PREDICTIONS).partition("/")
        entrance = self._entrance(unquote(name), unquote(rest.partition("/")[0]))
        if scope["method"] not in _METHODS:
            message = "A prediction is a POST, a PUT or a GET."
            raise _RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, "MethodNotAllowedException", message)
        body = await self._body(headers, receive)
        request = _request(scope, headers, writer.request_id, body)
        await _answer(entrance, request, receive, writer, in_chunks=entrance.service.streams)

    async def _call(self, call: str, headers: dict[str, str], receive: Receive, writer: Writer) -> None:
        if call not in _CALLS:
            message = f"There is no call {call[:100]} here, only {' and '.join(sorted(_CALLS))}."
            raise _RefusedError(HTTPStatus.NOT_IMPLEMENTED, "Unimplemented", message)
        body = await self._body(headers, receive)
        try:
            name, version, request = grpc.request_in(body, headers, writer.request_id)
        except grpc.NotGrpcError as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "BadRequestException", str(error)) from None
        entrance = self._entrance(name, version)
        writer.request_id = request.id
        in_chunks = entrance.service.streams and call == "StreamPredictions"
        await _answer(entrance, request, receive, writer, in_chunks=in_chunks)

    async def _infer(
        self, scope: Message, headers: dict[str, str], request_id: str, receive: Receive
    ) -> ServiceResponse:
        """The answer to a call of the Open Inference Protocol, whose failures have a form of their own."""
        try:
            body = await self._body(headers, receive)
        except _RefusedError as refused:
            return open_inference.failure(InferenceError(str(refused), refused.status))
        caller = Caller(request_id, with_own_keys(headers), headers)
        call = open_inference.answer(self._open_inference, scope["method"], scope["path"], body, caller)
        answer = await while_client_stays(receive, call)
        if answer is None:
            raise _LeftError
        return answer

    async def _infer_call(self, call: str, headers: dict[str, str], receive: Receive, writer: Writer) -> None:
        """Answer a call of the Open Inference Protocol over gRPC."""
        body = await self._body(headers, receive)
        options = with_own_keys({**headers, **grpc.time_limit(headers.get("grpc-timeout", ""))})
        caller = Caller(writer.request_id, options, headers)
        try:
            message = grpc.message_in(body)
            answering = open_inference_grpc.answer(self._open_inference, call, message, caller)
            answer = await while_client_stays(receive, answering)
        except grpc.NotGrpcError as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "BadRequestException", str(error)) from None
        except InferenceError as error:
            raise _RefusedError(HTTPStatus(error.status), "InferenceError", error.message) from None
        if answer is None:
            raise _LeftError
        await writer.message(answer)

    def _entrance(self, name: str, version: str) -> Entrance:
        entrance = self._find(name, version or None)
        if entrance is None:
            what = f"version {version[:100]} of {name[:100]}" if version else name[:100]
            raise _RefusedError(HTTPStatus.NOT_FOUND, "ModelNotFoundException", f"Model not found: {what}")
        return entrance

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_body:
            raise self._too_large()
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _LeftError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body:
                raise self._too_large()
            more = message.get("more_body", False)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _too_large(self) -> _RefusedError:
        message = f"The body is larger than {self._max_body:,} bytes, the max_request_size of config.properties."
        return _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "TooLarge", message)


def _request(scope: Message, headers: dict[str, str], request_id: str, body: bytes) -> ServiceRequest:
    """Raises _RefusedError."""
    content_type, encoding = headers.get("content-type"), headers.get("content-encoding")
    query: bytes = scope["query_string"]
    parameters = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True)) if query else {}
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
        with_own_keys(headers),
        parts,
        repeated,
        headers,
    )


async def _cancel_when_left(receive: Receive, in_flight: InFlight) -> None:
    with suppress(asyncio.CancelledError):
        await client_leaves(receive)
        in_flight.cancel()


async def _answer(
    entrance: Entrance, request: ServiceRequest, receive: Receive, writer: Writer, *, in_chunks: bool
) -> None:
    """Have the model answer, as long as the client waits; or cancel what the request names."""
    if "x-cancel" in request.options:
        cancelled = entrance.service.cancel(request.options["x-cancel"])
        await writer.whole(ServiceResponse(json.dumps({"cancelled": cancelled}).encode()))
        return
    in_flight = entrance.submit(request, in_chunks=in_chunks)
    loop = asyncio.get_running_loop()
    watching: list[asyncio.Task[None]] = []
    timer = loop.call_later(
        WATCH_AFTER_S, lambda: watching.append(loop.create_task(_cancel_when_left(receive, in_flight)))
    )
    try:
        await _write_answer(writer, in_flight)
    finally:
        timer.cancel()
        for task in watching:
            task.cancel()


async def _write_answer(writer: Writer, in_flight: InFlight) -> None:
    """The whole answer; or its chunks, each as soon as it is there, and then the rest."""
    item = await in_flight.next()
    if isinstance(item, ServiceResponse):
        await writer.whole(item)
        return
    await writer.begin(item.content_type)
    while isinstance(item, AnswerChunk):
        await writer.chunk(item.body)
        item.taken()  # it is with the socket, and `send` has waited until those before it had left
        item = await in_flight.next()
    await writer.end(item)


def _failure(status: HTTPStatus, kind: str, message: str, request_id: str) -> ServiceResponse:
    """A failure in the form of the models' own."""
    fields = {"code": int(status), "type": kind, "message": message, "request_id": request_id}
    return ServiceResponse(json.dumps(fields).encode(), status=int(status))
