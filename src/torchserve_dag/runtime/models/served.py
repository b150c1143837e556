"""A node whose model another server serves, on this machine or another, called over gRPC."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.data import codec
from torchserve_dag.runtime.data.loopback import is_loopback
from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.data.parts import BODY, fields_apart
from torchserve_dag.runtime.engine.runner import Cancel, Done
from torchserve_dag.runtime.graph.kinds import ServedCode
from torchserve_dag.runtime.messages import Failure, InputError, Photo, Text
from torchserve_dag.runtime.project.home import STATE
from torchserve_dag.runtime.project.workflow_file import TLS

logger = logging.getLogger(__name__)

OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # the environment's proxy is for the web, not for model servers
    ("grpc.max_receive_message_length", -1),  # no limit here but the server's; grpc's default is 4 MB
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # a server that is up again is connected within a second
    # TorchServe's netty closes a connection whose client pings more often than every five minutes. With any number
    # here grpc also closes a connection whose bytes are not acknowledged for `keepalive_timeout_ms`.
    ("grpc.keepalive_time_ms", 310_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)

MAX_PLAIN_PHOTO = 6_500_000
"""Bytes of pixels up to which a photo is sent uncompressed. TorchServe's default limit is 6,553,500 bytes."""

_TOO_LARGE = ("error code 8", "maximum size", "larger than max")
"""Parts of the errors for a body that is too large. TorchServe sends only the first, which is RST_STREAM's CANCEL."""


class ServedModel:
    """Calls one model of a server; a Starter. Nothing is sent before the first call: the server may start later.

    Answers are decoded, and `done` is called, on one thread for each address: `done` must return quickly.
    After `close`, and for a call that is cancelled, `done` gets a Failure.
    """

    def __init__(self, served: ServedCode, gives: Any) -> None:
        """`gives`: the type to decode each answer's body as; Any for the data of its JSON, or else its bytes.

        Raises ImportError where grpc is not installed; ValueError where a variable is not set, or its file no PEM.
        """
        for variable, what in ((served.token, "token"), (served.ca, "certificates")):
            if variable and not os.environ.get(variable):
                raise ValueError(f"the environment variable {variable}, for the {what} of {served.address}, is not set")
        self._served = served
        self._gives = gives
        self._calls: set[Any] = set()
        self._closed = False
        self._channel = _Channel.to(served.address, served.ca)

    def __call__(self, value: Any, options: Options, done: Done) -> Cancel:
        """Start one call. The model gets the options as its client's: the time that is left, the priority, the span."""
        served, timeout_s = self._served, cast("float", options.timeout_s)
        try:
            fields = fields_apart(value)
            inputs = {BODY: _body_of(value)} if fields is None else {name: _part(one) for name, one in fields.items()}
            # As inputs: TorchServe passes neither gRPC's deadline nor its metadata to its worker.
            headers = {name: text.encode() for name, text in options.headers().items()}
            request = self._channel.request(
                model_name=served.name, model_version=served.version or "", input=inputs | headers
            )
            token = self._token()
            metadata = (("authorization", f"Bearer {token}"),) if token else ()
            call = self._channel.predictions(request, timeout=timeout_s, metadata=metadata)
        except Exception as error:  # noqa: BLE001 (whatever encoding or grpc raises)
            message, status = f"{self._name} cannot be called", HTTPStatus.INTERNAL_SERVER_ERROR
            fault = logs.report(logger, error, message, line=False)
            done(Failure(status, f"{message}.", "InternalError", fault=fault))
            return _nothing
        self._calls.add(call)
        size = sum(map(len, inputs.values()))
        call.add_done_callback(lambda call: self._ended(call, size, timeout_s, done))

        def cancel() -> None:
            call.cancel()

        return cancel

    def close(self) -> None:
        """Cancel the calls in flight."""
        if self._closed:
            return
        self._closed = True
        for call in self._calls.copy():
            call.cancel()
        self._channel.leave()

    @property
    def _name(self) -> str:
        version = f"/{self._served.version}" if self._served.version else ""
        return f"{self._served.name}{version} at {self._served.address}"

    def _token(self) -> str | None:
        if self._served.token:
            return os.environ[self._served.token]
        return next(filter(None, map(_key_in, _key_files(self._served.address))), None)

    def _ended(self, call: Any, size: int, timeout_s: float, done: Done) -> None:
        self._calls.discard(call)
        code = call.code().name
        try:
            if code == "OK":
                answer = self._answer(call.result().prediction)
            elif said := _failure_of(call):
                answer = self._passed_on(said)
            else:
                answer = self._failed(code, call.details() or "", size, timeout_s)
        except Exception as error:  # noqa: BLE001 (as above)
            fault = logs.report(logger, error, f"the answer of {self._name} cannot be read", line=False)
            message = f"The answer of {self._name} cannot be read."
            answer = Failure(HTTPStatus.BAD_GATEWAY, message, "UnexpectedAnswer", fault=fault)
        done(answer)

    def _answer(self, body: bytes) -> Any:
        failure = codec.failure_in(body)  # TorchServe's gRPC loses the status of a failure
        if failure:
            return self._passed_on(failure)
        try:
            return codec.decode_answer(self._gives, body)
        except InputError as error:
            message = f"The answer of {self._name} is not {codec.describe(self._gives)}: {error.message}"
            return Failure(HTTPStatus.BAD_GATEWAY, message, "UnexpectedAnswer")

    def _passed_on(self, failure: Failure) -> Failure:
        """The failure of the served model as that of this node."""
        where = f"{failure.node} of {self._name}" if failure.node else self._name
        status = failure.status  # 408: its client, which is this node, did not wait longer
        status = HTTPStatus.GATEWAY_TIMEOUT if status == HTTPStatus.REQUEST_TIMEOUT else status
        return Failure(status, f"{failure.message} ({where})", failure.type)

    def _failed(self, code: str, text: str, size: int, timeout_s: float) -> Failure:
        """The failure of a call without an answer. TorchServe's own errors end with a line that names a Java class."""
        name, address = self._name, self._served.address
        reason, _, java = text.partition("\n")
        reason = reason.rstrip(".")
        match code:
            case "DEADLINE_EXCEEDED":
                status, kind = HTTPStatus.GATEWAY_TIMEOUT, "Timeout"
                message = f"{name} gave no answer within {timeout_s:g} s."
            case "PERMISSION_DENIED" | "UNAUTHENTICATED":
                status, kind, message = HTTPStatus.BAD_GATEWAY, "Unauthorized", self._refused()
            case "UNIMPLEMENTED":
                status, kind = HTTPStatus.BAD_GATEWAY, "ModelNotFound"
                message = f"{address} is not where a TorchServe answers gRPC calls for predictions: {reason}."
            case "INTERNAL" | "NOT_FOUND" if "NotFoundException" in java:
                status, kind = HTTPStatus.BAD_GATEWAY, "ModelNotFound"
                message = f"{address} does not serve what the workflow calls: {reason}."
            case "INTERNAL" if "has no worker to serve" in reason:
                status, kind = HTTPStatus.SERVICE_UNAVAILABLE, "Overloaded"
                message = f"{name} has no worker, or no room in its queue."
            case "CANCELLED" | "RESOURCE_EXHAUSTED" if any(words in text for words in _TOO_LARGE):
                status, kind = HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "TooLarge"
                message = f"{name} accepts no body of {size:,} bytes: send less, or raise its max_request_size."
            case "RESOURCE_EXHAUSTED" if not java:  # with a Java class, TorchServe reports a worker that died
                status, kind, message = HTTPStatus.SERVICE_UNAVAILABLE, "Overloaded", f"{name} is overloaded: {reason}."
            case "CANCELLED":
                status, kind = HTTPStatus.SERVICE_UNAVAILABLE, "Cancelled"
                message = f"The call of {name} was cancelled."
            case "UNAVAILABLE" if not java:
                status, kind = HTTPStatus.SERVICE_UNAVAILABLE, "Unreachable"
                message = f"{address} cannot be reached: {reason}. Is a TorchServe up, and is this its gRPC address?"
            case _:
                status, kind = HTTPStatus.BAD_GATEWAY, "ServedModelFailed"
                message = f"{name} failed, and its server's log says why: {reason}."
        return Failure(status, message, kind)

    def _refused(self) -> str:
        address, variable = self._served.address, self._served.token
        if variable:
            return f"{address} refuses the token in the environment variable {variable}: it is wrong, or has expired."
        key_file = next(filter(_key_in, _key_files(address)), None)
        what_to_do = "name the environment variable that holds the right token as `token` of the node's `served`"
        if key_file:
            return f"{address} refuses the token in {key_file}: it is another server's, or has expired; {what_to_do}."
        return f"{address} wants a token; {what_to_do}."


class _Channel:
    """The channel to an address, shared by all served nodes of this process; the last to leave closes it."""

    _open: dict[tuple[str, str | None], _Channel] = {}  # noqa: RUF012 (by address and variable of certificates)
    _changes = threading.Lock()

    def __init__(self, address: str, ca: str | None) -> None:
        try:
            import grpc  # noqa: PLC0415 (an archive without served nodes is served where grpc is not installed)

            from torchserve_dag.runtime.protos import inference_pb2, inference_pb2_grpc  # noqa: PLC0415
        except Exception as error:  # noqa: BLE001 (each of them checks versions, and raises exceptions of any type)
            what = (
                f"a node that calls {address} over gRPC needs grpcio, protobuf and googleapis-common-protos in the "
                f"Python of its worker: {error}"
            )
            raise ImportError(what) from None
        self._key = address, ca
        self._users = 0
        if address.startswith(TLS):
            trusted = grpc.ssl_channel_credentials(_certificates(ca, address) if ca else None)
            self._grpc_channel = grpc.secure_channel(address.removeprefix(TLS), trusted, OPTIONS)
        else:
            self._grpc_channel = grpc.insecure_channel(address, OPTIONS)
        self.request = inference_pb2.PredictionsRequest
        self.predictions = inference_pb2_grpc.InferenceAPIsServiceStub(self._grpc_channel).Predictions.future

    @classmethod
    def to(cls, address: str, ca: str | None) -> _Channel:
        with cls._changes:
            channel = cls._open.get((address, ca))
            if channel is None:
                channel = cls._open[address, ca] = cls(address, ca)
            channel._users += 1
            return channel

    def leave(self) -> None:
        with self._changes:
            self._users -= 1
            if self._users:
                return
            del self._open[self._key]
        self._grpc_channel.close()


def _body_of(value: Any) -> bytes:
    if isinstance(value, Text):
        # Not as JSON: over gRPC, without a content type, a server cannot tell JSON from a text that looks like JSON.
        return value.text.encode()
    if isinstance(value, Photo):
        return _photo(value)
    return codec.encode(value)[0]


def _part(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else _body_of(value)


def _photo(photo: Photo) -> bytes:
    if 3 * photo.width * photo.height < MAX_PLAIN_PHOTO:
        return codec.bmp(photo)
    body = io.BytesIO()
    photo.image.save(body, "PNG", compress_level=1)
    return body.getvalue()


def _key_files(address: str) -> list[Path]:
    """The files that may hold the token of a server at `address`, if that is on this host and no front door.

    TorchServe writes them into its working directory. A worker's parent process is its TorchServe, so models of
    one server find each other; a program finds the server that `torchserve-dag up` started in its folder. They
    are read for each call, as a server makes new ones whenever it starts.
    """
    if address.startswith(TLS) or not is_loopback(address.rpartition(":")[0]):
        return []
    state = os.environ.get(STATE)
    files = [Path(".torchserve-dag/key_file.json"), Path(f"/proc/{os.getppid()}/cwd/key_file.json")]
    return [*files, *([Path(state) / "key_file.json"] if state else [])]


def _certificates(variable: str, address: str) -> bytes:
    """Raises ValueError."""
    path = os.environ[variable]
    try:
        pem = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}, with the certificates of {address}, cannot be read: {error.strerror}") from None
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        raise ValueError(f"{path}, of the environment variable {variable}, holds no certificate in PEM form")
    return pem


def _failure_of(call: Any) -> Failure | None:
    """The failure of a call as its model wrote it, which a front door passes on beside the status."""
    written = dict(call.trailing_metadata() or ()).get("x-failure")
    return codec.failure_in(written.encode()) if isinstance(written, str) else None


def _key_in(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_bytes())["inference"]["key"])
    except (OSError, ValueError, KeyError, TypeError):  # the file does not exist, or is being written
        return None


def _nothing() -> None:
    """Cancel a call that was never started."""
