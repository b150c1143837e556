"""The clients' exceptions, the same over REST and gRPC.

    ServingError
    ├── Unreachable             no connection could be made; nothing was delivered
    ├── ConnectionLost          the connection broke before the answer came; the request may have been served
    ├── DeadlineExceeded        no answer in time: the client's own deadline, or the server's
    ├── TlsFailed               unencrypted to a TLS port or the reverse, or a certificate that is not trusted
    ├── UnexpectedAnswer        an answer, but not a message of the requested type
    ├── RequestRefused          4xx: the sender can correct it
    │   ├── Unauthorized        the token is missing, wrong or expired
    │   ├── ModelNotFound       no such model, or no such version of it
    │   └── TooLarge            the body is larger than the server accepts
    └── ServerFailed            5xx: the server's owner can correct it
        └── Overloaded          no worker, or no room in its queue; try later

The names say what happened, without "Error": `except Unreachable` reads as a sentence.
"""
# ruff: noqa: N818

from __future__ import annotations

import json
import re
from http import HTTPStatus
from typing import Any, TypeAlias

from torchserve_dag.runtime.data import codec

NO_WORKER = "ServiceUnavailableException"
"""TorchServe's type for a request that it never queued: no worker, or a full queue."""
NO_MODEL = "ModelNotFoundException"
"""TorchServe's type for a model that it does not serve."""
RAISED = "InternalServerException"
"""TorchServe's type, beside a 503, for a handler that raised."""


_NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "UNKNOWN_PROTOCOL")
_OTHER_NAME = ("Hostname mismatch", "IP address mismatch", "Hostname Verification Check", "not in peer certificate")
_VERIFY_DETAIL = re.compile(r"certificate verify failed: ([^(]+?) \(_ssl")


class ServingError(Exception):
    """A call has no answer. The message says why."""

    def __init__(
        self, status: int, kind: str, message: str, node: str | None = None, request_id: str | None = None
    ) -> None:
        super().__init__(status, kind, message, node, request_id)
        self.status = int(status)
        """The HTTP status, over gRPC too; without an answer, the status that a gateway would give."""
        self.type = kind
        """A short name for programs: the server's own, if it gave one."""
        self.message = message
        self.node = node
        """The workflow's node that failed, if the server named it."""
        self.request_id = request_id
        """The request's id in the server's log, if the server told it."""

    def __str__(self) -> str:
        facts = [f"{self.status} {self.type}"]
        facts += [f"node {self.node}"] if self.node else []
        facts += [f"request {self.request_id}"] if self.request_id else []
        return f"{self.message} ({', '.join(facts)})"

    @property
    def unserved(self) -> bool:
        """True if the request cannot have been served, so that sending it again is safe."""
        return False


class Unreachable(ServingError):
    """No connection could be made; nothing was delivered."""

    @property
    def unserved(self) -> bool:
        return True


class ConnectionLost(ServingError):
    """The connection broke before the answer came; the request may have been served."""


class TlsFailed(ServingError):
    """No TLS connection: unencrypted to a TLS port or the reverse, or a certificate that is not trusted.

    Nothing was delivered, and waiting does not help.
    """


class DeadlineExceeded(ServingError):
    """No answer in time: the client's own deadline, or the server's. The status is always 504, also where the server
    answered 408 because the client's was shorter.
    """


class UnexpectedAnswer(ServingError):
    """An answer, but not a message of the requested type."""


class RequestRefused(ServingError):
    """4xx: the sender can correct it."""


class Unauthorized(RequestRefused):
    """The token is missing, wrong or expired. The status is always 401, where TorchServe answers 400 or 403."""


class ModelNotFound(RequestRefused):
    """No such model, or no such version of it."""


class TooLarge(RequestRefused):
    """The body is larger than the server accepts."""


class ServerFailed(ServingError):
    """5xx: the server's owner can correct it."""


class Overloaded(ServerFailed):
    """No worker, or no room in its queue (503), or a front door's limit (429); try later."""

    @property
    def unserved(self) -> bool:
        # Other 503s may come from a worker, after it has done the work.
        return self.type == NO_WORKER or self.status == HTTPStatus.TOO_MANY_REQUESTS


Kind: TypeAlias = type[ServingError]


def unreachable(address: object, why: object) -> Unreachable | TlsFailed:
    """The exception for a connection that could not be made; `why` is the text of httpx or grpc."""
    failed = _tls_failure(address, str(why))
    if failed:
        return failed
    message = f"{address} cannot be reached: {why or 'no connection'}. Is the server up, and is this its address?"
    return Unreachable(HTTPStatus.SERVICE_UNAVAILABLE, "Unreachable", message)


def connection_lost(address: object, why: object) -> ConnectionLost:
    message = f"{address} closed the connection before it answered: {why or 'no reason given'}."
    return ConnectionLost(HTTPStatus.BAD_GATEWAY, "ConnectionLost", message)


def plain_to_tls(address: object) -> TlsFailed:
    where = str(address).removeprefix("http://")
    return _tls_failed(f"{address} answers only over TLS, but was called without: write https://{where}.")


def _tls_failure(address: object, why: str) -> TlsFailed | None:
    """The failed TLS handshake in an error text of httpx (OpenSSL) or grpc (BoringSSL); None if it is another error."""
    if any(words in why for words in _NOT_TLS):
        return _tls_failed(
            f"{address} does not answer over TLS: write http://HOST:PORT for TorchServe's own port. The front door "
            "speaks TLS, at port 8443 unless front_door.yaml says otherwise."
        )
    if any(words in why for words in _OTHER_NAME):
        return _tls_failed(
            f"{address} shows a certificate that was issued for another name: write the address with that name, or "
            "give the name as server_name=."
        )
    if "CERTIFICATE_VERIFY_FAILED" in why:
        detail = _VERIFY_DETAIL.search(why)
        return _tls_failed(
            f"{address} shows a certificate that is not trusted{f' ({detail[1]})' if detail else ''}: give the PEM "
            "file of the certificate, or of its issuer's, as ca= (--ca on the command line)."
        )
    return None


def _tls_failed(message: str) -> TlsFailed:
    return TlsFailed(HTTPStatus.BAD_GATEWAY, "TlsFailed", message)


def deadline_exceeded(timeout_s: float) -> DeadlineExceeded:
    message = f"No answer within {timeout_s:g} s; give the call a longer timeout, or the model more workers."
    return DeadlineExceeded(HTTPStatus.GATEWAY_TIMEOUT, "DeadlineExceeded", message)


def unexpected_answer(message: str) -> UnexpectedAnswer:
    return UnexpectedAnswer(HTTPStatus.BAD_GATEWAY, "UnexpectedAnswer", message)


def error_of(
    status: int, kind: str = "", message: str = "", node: str | None = None, request_id: str | None = None
) -> ServingError:
    """The exception for a server's failure. TorchServe's types are more precise than its statuses, and go first."""
    chosen: Kind
    front_doors = status == HTTPStatus.FORBIDDEN and not kind  # the front door's 403; TorchServe's has a type
    if kind == "InvalidKeyException" or status == HTTPStatus.UNAUTHORIZED or front_doors:
        chosen, status = Unauthorized, HTTPStatus.UNAUTHORIZED
    elif kind in {NO_MODEL, "ModelVersionNotFoundException"}:
        chosen, status = ModelNotFound, HTTPStatus.NOT_FOUND
    elif status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        chosen = TooLarge
        message = message or "The body is larger than the server accepts; send less, or raise its max_request_size."
    elif status == HTTPStatus.GATEWAY_TIMEOUT or (status == HTTPStatus.REQUEST_TIMEOUT and kind == "Timeout"):
        chosen, status = DeadlineExceeded, HTTPStatus.GATEWAY_TIMEOUT
    elif status == HTTPStatus.TOO_MANY_REQUESTS or (status == HTTPStatus.SERVICE_UNAVAILABLE and kind != RAISED):
        chosen = Overloaded
    else:
        chosen = RequestRefused if status < HTTPStatus.INTERNAL_SERVER_ERROR else ServerFailed
    return chosen(status, kind or chosen.__name__, message or f"The server answered {int(status)}.", node, request_id)


def error_in(body: bytes) -> ServingError | None:
    """The failure that an answer holds instead of a message, as an exception."""
    failure = codec.failure_in(body)
    if failure is None:
        return None
    request_id = json.loads(body).get("request_id")
    return error_of(failure.status, failure.type, failure.message, failure.node, request_id)


def error_from_http(status: int, body: bytes, request_id: str | None) -> ServingError:
    """The exception for an HTTP answer that is not 2xx: from its JSON if it has one, else from its text."""
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or "message" not in fields:
        return error_of(status, message=body[:300].decode(errors="replace").strip(), request_id=request_id)
    kind, message = str(fields.get("type") or ""), str(fields["message"] or "")
    return error_of(status, kind, message, fields.get("node"), fields.get("request_id") or request_id)
