"""The gRPC clients, on grpcio, with TorchServe's own .proto files."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Generator, Sequence
from http import HTTPStatus
from typing import Any

import grpc
import grpc.aio
from google.protobuf.empty_pb2 import Empty

from torchserve_dag.clients.client import AsyncClient, Client
from torchserve_dag.clients.deadline import Deadline
from torchserve_dag.clients.errors import (
    NO_WORKER,
    ServingError,
    connection_lost,
    deadline_exceeded,
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
from torchserve_dag.clients.tokens import bearer
from torchserve_dag.runtime.data.options import PIECES
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

INFERENCE = "127.0.0.1:7070"
MANAGEMENT = "127.0.0.1:7071"
OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # a proxy that is set for the web is not the way to a model server
    ("grpc.max_receive_message_length", -1),  # the server's limit holds, not grpc's 4 MB
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),  # by default a retry within a second finds the last failure again
    ("grpc.max_reconnect_backoff_ms", 5000),
)


class _Stubs:
    """A server's two services, over two channels; what they want to see goes with every call."""

    def __init__(self, channels: Sequence[Any], tokens: tuple[str | None, str | None]) -> None:
        self._inference = InferenceAPIsServiceStub(channels[0])
        self._management = ManagementAPIsServiceStub(channels[1])
        self._metadata, self._management_metadata = (tuple(bearer(token).items()) for token in tokens)

    def start(self, call: Call, deadline: Deadline, *, stream: bool = False) -> Any:
        """Send a call; what grpc gives back is a message, an awaitable or an iterator, as the channel is."""
        inference, management = self._inference, self._management
        metadata = self._management_metadata
        method: Any
        request: Any
        match call:
            case Predict() | Cancel():
                method = inference.StreamPredictions if stream else inference.Predictions
                request = _predictions(call, deadline, stream=stream)
                metadata = (*self._metadata, *call.options.metadata().items())
            case Ping():
                method, request, metadata = inference.Ping, Empty(), self._metadata
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


class GrpcClient(Client):
    """The client over gRPC. `credentials` are grpc's, for a front door with TLS, whose certificate is for `server_name`
    where that is not its address; management is behind it, and has no TLS.
    """

    def __init__(
        self,
        inference: str = INFERENCE,
        management: str = MANAGEMENT,
        *,
        token: str | None = None,
        management_token: str | None = None,
        timeout: float = 30.0,
        retries: int = 2,
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str | None = None,
    ) -> None:
        super().__init__(timeout, retries)
        self._addresses = (inference, management)
        first = (
            grpc.secure_channel(inference, credentials, _options(server_name))
            if credentials
            else grpc.insecure_channel(inference, OPTIONS)
        )
        self._channels = [first, grpc.insecure_channel(management, OPTIONS)]
        self._stubs = _Stubs(self._channels, (token, management_token))

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def _send(self, call: Call, deadline: Deadline) -> bytes:
        try:
            return _body(self._stubs.start(call, deadline))
        except grpc.RpcError as error:
            raise _translated(error, self._addresses, call, deadline) from None

    def _stream(self, call: Call, deadline: Deadline) -> Generator[bytes, None, None]:
        replies = self._stubs.start(call, deadline, stream=True)
        try:
            for reply in replies:
                yield _body(reply)
        except grpc.RpcError as error:
            raise _translated(error, self._addresses, call, deadline) from None
        finally:
            replies.cancel()


class AsyncGrpcClient(AsyncClient):
    """The asyncio client over gRPC. It belongs to the event loop that first calls it."""

    def __init__(
        self,
        inference: str = INFERENCE,
        management: str = MANAGEMENT,
        *,
        token: str | None = None,
        management_token: str | None = None,
        timeout: float = 30.0,
        retries: int = 2,
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str | None = None,
    ) -> None:
        super().__init__(timeout, retries)
        self._addresses = (inference, management)
        self._tokens = (token, management_token)
        self._credentials = credentials
        self._server_name = server_name
        self._channels: list[grpc.aio.Channel] = []
        self._made: _Stubs | None = None

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    @property
    def _stubs(self) -> _Stubs:
        if self._made is None:  # a channel wants a running event loop, which a constructor need not have
            inference, management = self._addresses
            first = (
                grpc.aio.secure_channel(inference, self._credentials, _options(self._server_name))
                if self._credentials
                else grpc.aio.insecure_channel(inference, OPTIONS)
            )
            self._channels = [first, grpc.aio.insecure_channel(management, OPTIONS)]
            self._made = _Stubs(self._channels, self._tokens)
        return self._made

    async def _send(self, call: Call, deadline: Deadline) -> bytes:
        try:
            return _body(await self._stubs.start(call, deadline))
        except grpc.RpcError as error:
            raise _translated(error, self._addresses, call, deadline) from None

    async def _stream(self, call: Call, deadline: Deadline) -> AsyncGenerator[bytes, None]:
        replies = self._stubs.start(call, deadline, stream=True)
        try:
            async for reply in replies:
                yield _body(reply)
        except grpc.RpcError as error:
            raise _translated(error, self._addresses, call, deadline) from None
        finally:
            replies.cancel()


def _options(server_name: str | None) -> tuple[tuple[str, str | int], ...]:
    return (*OPTIONS, ("grpc.ssl_target_name_override", server_name)) if server_name else OPTIONS


def _predictions(call: Predict | Cancel, deadline: Deadline, *, stream: bool) -> PredictionsRequest:
    # TorchServe hands its worker neither grpc's metadata nor its deadline, nor says which method was called.
    asks = call.asks(deadline.left()) | ({PIECES: "true"} if stream else {})
    texts = {key: value.encode() for key, value in {**call.parameters, **asks}.items()}
    return PredictionsRequest(
        model_name=call.name, model_version=call.version or "", input={"body": call.body.content, **texts}
    )


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
"""The HTTP status that a code stands for; TorchServe's GRPCUtils, the other way round."""

_JAVA_CLASS = re.compile(r"(?:[\w.$]*\.)?(\w+Exception)(?:\.\(\))?")
_CANCELLED = (
    "TorchServe cancelled the call, as it does where a body is larger than its max_request_size;"
    " this one has {:,} bytes."
)
_NO_CONNECTION = ("failed to connect", "connection refused", "dns resolution", "name resolution", "unreachable")


def _translated(  # noqa: PLR0911 (one return a kind of failure)
    error: Any, addresses: tuple[str, str], call: Call, deadline: Deadline
) -> ServingError:
    """The error of grpc as ours. TorchServe ends its descriptions with a line that names a Java class: the type."""
    code, text = error.code(), error.details() or ""
    message, _, last = text.rpartition("\n")
    found = _JAVA_CLASS.fullmatch(last.strip())
    if found:
        return _from_torchserve(code, found[1], message)
    address = addresses[0 if isinstance(call, Predict | Cancel | Ping) else 1]
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
        size = len(call.body.content) if isinstance(call, Predict) else 0
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
