"""The gRPC clients, on grpcio, with TorchServe's own .proto files."""

from __future__ import annotations

import re
import threading
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import grpc
import grpc.aio
from google.protobuf.empty_pb2 import Empty

from torchserve_dag.clients import tls
from torchserve_dag.clients.address import Address
from torchserve_dag.clients.client import AsyncClient, Client
from torchserve_dag.clients.deadline import Deadline
from torchserve_dag.clients.errors import (
    NO_WORKER,
    ServingError,
    connection_lost,
    deadline_exceeded,
    error_in,
    error_of,
    unreachable,
)
from torchserve_dag.clients.flows import (
    PAGE,
    Call,
    Cancel,
    Describe,
    Feedback,
    ListModels,
    Ping,
    Predict,
    Register,
    SetDefault,
    Unregister,
)
from torchserve_dag.clients.settings import Port
from torchserve_dag.runtime.data.codec import FAILURE_TRAILER
from torchserve_dag.runtime.data.options import CONTENT_TYPE, PIECES
from torchserve_dag.runtime.protos.inference_pb2 import PredictionResponse, PredictionsRequest, TorchServeHealthResponse
from torchserve_dag.runtime.protos.inference_pb2_grpc import InferenceAPIsServiceStub
from torchserve_dag.runtime.protos.management_pb2 import (
    DescribeModelRequest,
    ListModelsRequest,
    ManagementResponse,
    RegisterModelRequest,
    SetDefaultRequest,
    UnregisterModelRequest,
)
from torchserve_dag.runtime.protos.management_pb2_grpc import ManagementAPIsServiceStub

OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # the environment's proxy is for the web, not for model servers
    ("grpc.max_receive_message_length", -1),  # no limit here but the server's; grpc's default is 4 MB
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),  # with grpc's default, a retry within a second repeats the last failure
    ("grpc.max_reconnect_backoff_ms", 5000),
)


@dataclass(eq=False)
class GrpcClient(Client):
    """The client over gRPC. With `insecure`, the constructor fetches the server's certificate: raises Unreachable."""

    protocol = "grpc"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._channels = _Channels(grpc, _Encryption.of(self._inference, self._trust, self.server_name))

    def close(self) -> None:
        for channel in self._channels.all():
            channel.close()

    def _send(self, call: Call, deadline: Deadline) -> bytes:
        port = self._port(call)
        try:
            return _body(_start(self._channels.to(port.address), port, call, deadline))
        except grpc.RpcError as error:
            raise _translated(error, port.address, call, deadline) from None

    def _stream(self, call: Call, deadline: Deadline) -> Generator[bytes, None, None]:
        port = self._port(call)
        replies = _start(self._channels.to(port.address), port, call, deadline, stream=True)
        try:
            for reply in replies:
                yield _body(reply)
        except grpc.RpcError as error:
            raise _translated(error, port.address, call, deadline) from None
        finally:
            replies.cancel()


@dataclass(eq=False)
class AsyncGrpcClient(AsyncClient):
    """The asyncio client over gRPC. It belongs to the event loop that first calls it; `insecure` as GrpcClient."""

    protocol = "grpc"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._channels = _Channels(grpc.aio, _Encryption.of(self._inference, self._trust, self.server_name))

    async def close(self) -> None:
        for channel in self._channels.all():
            await channel.close()

    async def _send(self, call: Call, deadline: Deadline) -> bytes:
        port = self._port(call)
        try:
            return _body(await _start(self._channels.to(port.address), port, call, deadline))
        except grpc.RpcError as error:
            raise _translated(error, port.address, call, deadline) from None

    async def _stream(self, call: Call, deadline: Deadline) -> AsyncGenerator[bytes, None]:
        port = self._port(call)
        replies = _start(self._channels.to(port.address), port, call, deadline, stream=True)
        try:
            async for reply in replies:
                yield _body(reply)
        except grpc.RpcError as error:
            raise _translated(error, port.address, call, deadline) from None
        finally:
            replies.cancel()


@dataclass(frozen=True, slots=True)
class _Encryption:
    """The TLS settings of channels."""

    roots: bytes | None = None
    """The PEM certificates to trust; None for grpc's own list of public authorities."""
    server_name: str | None = None

    @classmethod
    def of(cls, address: Address, trust: tls.Trust, server_name: str | None) -> _Encryption:
        """Raises Unreachable if any certificate is accepted, and the server's cannot be fetched."""
        pem = trust.pem
        if trust.insecure:
            pem, server_name = tls.shown_by(address)
        return cls(pem.encode() if pem else None, server_name)


class _Channel:
    """A connection to one address, with the two services that TorchServe has."""

    def __init__(self, channel: Any) -> None:
        self.close = channel.close
        self.inference = InferenceAPIsServiceStub(channel)
        self.management = ManagementAPIsServiceStub(channel)


class _Channels:
    """A channel for each address, opened at the first call, because asyncio's channels need a running event loop."""

    def __init__(self, api: Any, encryption: _Encryption) -> None:
        """`api` is grpc or grpc.aio."""
        self._api = api
        self._encryption = encryption
        self._open: dict[Address, _Channel] = {}
        self._changes = threading.Lock()

    def to(self, address: Address) -> _Channel:
        with self._changes:
            if address not in self._open:
                self._open[address] = _Channel(self._channel(address))
            return self._open[address]

    def all(self) -> list[_Channel]:
        return list(self._open.values())

    def _channel(self, address: Address) -> Any:
        if not address.tls:
            return self._api.insecure_channel(address.target, OPTIONS)
        name = self._encryption.server_name
        options = (*OPTIONS, ("grpc.ssl_target_name_override", name)) if name else OPTIONS
        credentials = grpc.ssl_channel_credentials(self._encryption.roots)
        return self._api.secure_channel(address.target, credentials, options)


def _start(channel: _Channel, port: Port, call: Call, deadline: Deadline, *, stream: bool = False) -> Any:
    """Send a call; grpc returns a message, an awaitable or an iterator, according to the channel."""
    inference, management = channel.inference, channel.management
    metadata = tuple(port.authorization.items())
    method: Any
    request: Any
    match call:
        case Predict() | Cancel():
            method = inference.StreamPredictions if stream else inference.Predictions
            request = _predictions(call, deadline, stream=stream)
            metadata = (*metadata, *call.options.metadata().items())
        case Ping():
            method, request = inference.Ping, Empty()
        case ListModels():
            # Without a limit it is 0, and TorchServe lists nothing; its .proto promises 100.
            method, request = management.ListModels, ListModelsRequest(limit=PAGE, next_page_token=call.page)
        case Describe():
            method = management.DescribeModel
            request = DescribeModelRequest(
                model_name=call.name, model_version=call.version or "", customized=call.customized
            )
        case SetDefault():
            method = management.SetDefault
            request = SetDefaultRequest(model_name=call.name, model_version=call.version)
        case Register():
            method, request = management.RegisterModel, RegisterModelRequest(url=call.archive)
        case Unregister():
            method = management.UnregisterModel
            request = UnregisterModelRequest(model_name=call.name, model_version=call.version)
        case Feedback():
            raise TypeError("feedback goes over REST: TorchServe's gRPC has no method for it")
    return method(request, timeout=deadline.left(), metadata=metadata)


def _predictions(call: Predict | Cancel, deadline: Deadline, *, stream: bool) -> PredictionsRequest:
    # TorchServe hands its worker neither grpc's metadata nor its deadline, nor says which method was called.
    asks = call.asks(deadline.left()) | ({PIECES: "true"} if stream else {})
    parts = {name: part.content for name, part in call.parts().items()}
    if call.body_is_json():  # a server can tell a photo from its bytes, but not JSON from a text that looks like it
        asks |= {CONTENT_TYPE: "application/json"}
    texts = {name: value.encode() for name, value in asks.items()}
    return PredictionsRequest(model_name=call.name, model_version=call.version or "", input=parts | texts)


def _body(reply: PredictionResponse | TorchServeHealthResponse | ManagementResponse) -> bytes:
    if isinstance(reply, PredictionResponse):
        return reply.prediction
    if isinstance(reply, TorchServeHealthResponse):
        return reply.health.encode()
    return reply.msg.encode()


_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    grpc.StatusCode.FAILED_PRECONDITION: HTTPStatus.BAD_REQUEST,
    grpc.StatusCode.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    grpc.StatusCode.PERMISSION_DENIED: HTTPStatus.FORBIDDEN,
    grpc.StatusCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    grpc.StatusCode.ABORTED: HTTPStatus.CONFLICT,
    grpc.StatusCode.OUT_OF_RANGE: HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    grpc.StatusCode.UNIMPLEMENTED: HTTPStatus.NOT_IMPLEMENTED,
    grpc.StatusCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
}
"""gRPC code → HTTP status: the inverse of TorchServe's GRPCUtils."""

_JAVA_CLASS = re.compile(r"(?:[\w.$]*\.)?(\w+Exception)(?:\.\(\))?")
_CANCELLED = (
    "TorchServe cancelled the call, as it does where a body is larger than its max_request_size;"
    " this one has {:,} bytes."
)
_NO_CONNECTION = ("failed to connect", "connection refused", "dns resolution", "name resolution", "unreachable")


def _translated(  # noqa: PLR0911 (one return a kind of failure)
    error: Any, address: Address, call: Call, deadline: Deadline
) -> ServingError:
    """Our exception for grpc's. The last line of TorchServe's descriptions names a Java class, which is the type."""
    failure = dict(error.trailing_metadata() or ()).get(FAILURE_TRAILER)  # a model's failure, which has all its fields
    if failure and (explained := error_in(failure.encode())):
        return explained
    code, text = error.code(), error.details() or ""
    message, _, last = text.rpartition("\n")
    java = _JAVA_CLASS.fullmatch(last.strip())
    if java:
        return _from_torchserve(code, java[1], message)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return deadline_exceeded(deadline.timeout_s)
    if code is grpc.StatusCode.PERMISSION_DENIED and text.startswith("Token Auth"):
        return error_of(HTTPStatus.UNAUTHORIZED, "InvalidKeyException", text)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and ("maximum size" in text or "larger than" in text):
        return error_of(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    if code is grpc.StatusCode.UNAVAILABLE and "upstream" not in text:  # that word is a front door's
        no_connection = any(words in text.lower() for words in _NO_CONNECTION)
        return unreachable(address, text) if no_connection else connection_lost(address, text)
    if code is grpc.StatusCode.CANCELLED:
        # TorchServe cancels a call whose body is over its limit (RST_STREAM 8, CANCEL) and does not say why.
        size = sum(len(part.content) for part in call.parts().values()) if isinstance(call, Predict) else 0
        too_large = error_of(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message=_CANCELLED.format(size))
        return too_large if size and "error code 8" in text else connection_lost(address, text)
    return error_of(_STATUS.get(code, HTTPStatus.INTERNAL_SERVER_ERROR), message=text)


def _from_torchserve(code: grpc.StatusCode, kind: str, message: str) -> ServingError:
    status = _STATUS.get(code, HTTPStatus.INTERNAL_SERVER_ERROR)
    if "has no worker to serve" in message:  # INTERNAL here, 503 over REST
        return error_of(HTTPStatus.SERVICE_UNAVAILABLE, NO_WORKER, message)
    if kind == "BadRequestException":
        status = HTTPStatus.BAD_REQUEST
    elif status == HTTPStatus.TOO_MANY_REQUESTS:  # a worker out of memory, or killed: 507 over REST
        status = HTTPStatus.INSUFFICIENT_STORAGE
    return error_of(status, kind, message)
