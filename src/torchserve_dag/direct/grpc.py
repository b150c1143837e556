"""TorchServe's gRPC calls, as Envoy's `grpc_http1_reverse_bridge` passes them on: over HTTP/1.1, framed as in gRPC.

A frame is a byte that is 0, the length of the message in four bytes, and the message. Envoy adds the trailer with the
status OK at an answer's end; a failure is an answer without a body, whose headers have the status. A failure after
messages is a frame of trailers, as gRPC-Web has it, whose first byte is 128: request.lua makes the answer's trailer of
it.
"""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from google.protobuf.any_pb2 import Any as Any_
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from torchserve_dag.direct.cancel_keys import with_own_keys
from torchserve_dag.runtime.protos.inference_pb2 import PredictionResponse, PredictionsRequest
from torchserve_dag.runtime.worker.protocol import Part, ServiceRequest, ServiceResponse

SERVICE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/"
CONTENT_TYPE = "application/grpc"
STATUSES = {401: 16, 403: 7, 404: 5, 408: 4, 409: 10, 413: 8, 429: 8, 499: 1, 501: 12, 503: 14, 504: 4, 507: 8}
"""HTTP status → gRPC status. Another 4xx is 3 (INVALID_ARGUMENT), another 5xx is 13 (INTERNAL)."""
TRAILERS_IN_BODY = "x-trailers-in-body"
"""The header that tells request.lua to look for a frame of trailers at the end of the body."""
DOMAIN = "torchserve-dag"
"""The domain of `google.rpc.ErrorInfo`: who defines its reasons."""
MAX_ID = 128
"""The most characters of a request's id; a longer one is replaced, as under TorchServe."""
MAX_FAILURE = 4_000
"""The most bytes of a failure that go into a header as a whole, and of its sentence: Envoy gives up an answer whose
headers have more than 60 KB."""
OPTIONS = frozenset(
    {
        "x-outputs",
        "x-timeout-ms",
        "x-priority",
        "traceparent",
        "x-request-id",
        "x-cancel-key",
        "x-cancel",
        "x-pieces",
        "x-usage",
    }
)
"""Entries of a call's map that are options of the request."""
OWN = frozenset({"x-door-token", "x-arrived-ms"})
"""What the front door writes into headers: entries of these names are nobody's."""
_OF_STATUS = frozenset({"type", "message"})
"""Fields of a failure that have a place of their own in `google.rpc.Status` and ErrorInfo."""
_INVALID, _INTERNAL = 3, 13
_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")
_UNITS_MS = {"n": 1e-6, "u": 1e-3, "m": 1.0, "S": 1e3, "M": 6e4, "H": 3.6e6}
_HEAD = 5
_MAX_DIGITS = 8


class NotGrpcError(ValueError):
    """A call that holds no message of its service: a sentence for the client."""


def message_in(body: bytes) -> bytes:
    """The message of a call. Raises NotGrpcError."""
    if len(body) < _HEAD or body[0] or int.from_bytes(body[1:_HEAD], "big") != len(body) - _HEAD:
        raise NotGrpcError("The call does not hold one whole, uncompressed message.")
    return body[_HEAD:]


def framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


def answer(body: bytes) -> bytes:
    """A framed PredictionResponse."""
    return framed(PredictionResponse(prediction=body).SerializeToString())


def request_in(body: bytes, headers: dict[str, str], new_id: str) -> tuple[str, str, ServiceRequest]:
    """The model, the version (or nothing) and the request of a `Predictions` or `StreamPredictions`.

    Raises NotGrpcError.

    Metadata are headers. Of an option that is an entry of the map, too, the entry counts, but for what the front door
    writes. `new_id` is the id of a request without one.
    """
    try:
        call = PredictionsRequest.FromString(message_in(body))
    except DecodeError:
        raise NotGrpcError("The message is no PredictionsRequest.") from None
    options = {**headers, **time_limit(headers.get("grpc-timeout", ""))}
    parts, content_type = [], None
    for name, content in call.input.items():
        option = name.lower()
        if option in OPTIONS:
            options[option] = content.decode("utf-8", "replace")
        elif option == "content-type":
            content_type = content.decode("utf-8", "replace")
        elif option not in OWN:
            parts.append(Part(name, content))
    about: dict[str, Any] = {"options": with_own_keys(options), "headers": headers}
    request_id = id_in(options) or new_id
    if len(parts) == 1 and parts[0].name == "body":
        request = ServiceRequest(request_id, parts[0].content, content_type, **about)
    else:
        request = ServiceRequest(request_id, parts=parts, **about)
    return call.model_name, call.model_version, request


def id_in(headers: Mapping[str, str]) -> str | None:
    """The id that a client gave its request; None if it is unfit for a header and a line of a log."""
    named = headers.get("x-request-id", "")
    return named if 0 < len(named) <= MAX_ID and named.isascii() and named.isprintable() else None


def time_limit(text: str) -> dict[str, str]:
    """The option that says what a call's header `grpc-timeout` says, such as `100m`; none if it has no such header."""
    number, unit = text[:-1], _UNITS_MS.get(text[-1:])
    if unit is None or not (number.isascii() and number.isdigit()) or len(number) > _MAX_DIGITS:
        return {}
    return {"x-timeout-ms": str(max(1, math.ceil(int(number) * unit)))}


def failure_headers(response: ServiceResponse) -> dict[str, str]:
    """The headers of a failed call. `response` is the failure as a model or this host writes it: JSON."""
    fields: dict[str, Any] = {}
    try:
        written_fields = json.loads(response.body)
        message, fields = _utf8(str(written_fields["message"])), dict(written_fields)
    except (ValueError, LookupError, TypeError):  # of an unedited archive, whose handler wrote what it liked
        message = f"The model answered with the status {response.status}."
    status = STATUSES.get(
        response.status, _INVALID if response.status < HTTPStatus.INTERNAL_SERVER_ERROR else _INTERNAL
    )
    headers = {**response.headers, "grpc-status": str(status), "grpc-message": quote(message, safe=_PLAIN)}
    written = response.body.decode("utf-8", "replace").strip()
    if len(written) <= MAX_FAILURE and written.isascii() and written.isprintable():
        headers["x-failure"] = written
    if fields and len(written) <= MAX_FAILURE:
        headers["grpc-status-details-bin"] = _details(status, message, fields)
    return headers


def trailers(response: ServiceResponse) -> bytes:
    """The frame that ends an answer of several messages with a failure."""
    headers = {"x-status": str(response.status), **failure_headers(response)}
    written = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
    return b"\x80" + len(written).to_bytes(4, "big") + written


def _details(status: int, message: str, fields: Mapping[str, Any]) -> str:
    """A failure's type, node and other fields as `google.rpc.ErrorInfo`, in the header where gRPC's libraries look."""
    about = {_utf8(name): _utf8(str(value)) for name, value in fields.items() if name not in _OF_STATUS and value}
    info, detail = ErrorInfo(reason=_utf8(str(fields.get("type", ""))), domain=DOMAIN, metadata=about), Any_()
    detail.Pack(info)
    written = Status(code=status, message=message, details=[detail]).SerializeToString()
    return b64encode(written).decode().rstrip("=")


def _utf8(text: str) -> str:
    """A text that can be written: JSON may hold halves of characters, and more than fits into a header."""
    return text.encode("utf-8", "replace")[:MAX_FAILURE].decode("utf-8", "ignore")
