"""TorchServe's requests as ServiceRequests: the body, the parameters and the options of a row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchserve_dag.runtime.compat.wire import WireRequest
from torchserve_dag.runtime.data.options import CANCEL, PIECES, named, without_options
from torchserve_dag.runtime.worker.protocol import Service, ServiceRequest, ServiceResponse
from torchserve_dag.runtime.worker.response import write_answer

BODY_KEYS = ("body", "data")
"""The key of a row's body: TorchServe calls a raw body `body`; clients of TorchServe call a form's part `data`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchServeRequest(ServiceRequest):
    """A request over REST or gRPC, with what decides the form of its response."""

    rest: bool
    """Whether the request came over REST."""
    describes: bool
    """Whether the request only asks for a description of the model."""

    @property
    def accepts_chunks(self) -> bool:
        return self.rest or PIECES in self.options


def read_request(wire: WireRequest) -> TorchServeRequest:
    """Read a request from its row and its headers, which include the content types of its parts.

    Its id is the client's `x-request-id`, and TorchServe's own id where the client sent none.
    """
    row, headers = wire.row, wire.headers
    key = next((name for name in BODY_KEYS if name in row), None)
    if key is None:
        names = without_options(dict.fromkeys(row, ""))
        if len(names) == 1:  # a gRPC client may call its one input as it likes
            (key,) = names
    body = row.get(key, b"") if key else b""
    part = headers.get(key) if key else None  # the content type of the body's own part, in a form
    parameters = {name: _text(value) for name, value in row.items() if name != key}
    named_headers = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
    options = {
        name.lower(): value for name, value in parameters.items()
    } | named_headers  # over gRPC, options are in the row
    return TorchServeRequest(
        named(options) or wire.id,
        bytes(body) if isinstance(body, bytes | bytearray) else json.dumps(body).encode(),
        part.get("content-type") if isinstance(part, dict) else None,
        without_options(parameters) if parameters else parameters,
        options,
        without_options(row),
        headers,
        rest=over_rest(named_headers),
        describes=headers.get("describe") == "True",
    )


def control(service: Service, request: TorchServeRequest) -> ServiceResponse | None:
    """The response to a request for the worker instead of the model: to describe the model, or cancel a request."""
    if request.describes:
        return write_answer(service.describe(), request.id)
    key = request.options.get(CANCEL)
    return None if key is None else write_answer({"cancelled": service.cancel(key)}, request.id)


def over_rest(headers: Mapping[str, Any]) -> bool:
    """Whether a request came over REST and is no description, which TorchServe answers with one message, as over gRPC.

    TorchServe adds the header `explain` to most REST predictions, and no header to gRPC's. HTTP/1.1 has a `Host`.
    """
    if isinstance(headers.get("explain"), str):
        return True
    names = {name.lower() for name, value in headers.items() if isinstance(value, str)}
    return "explain" in names or ("host" in names and "describe" not in names)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes | bytearray) else str(value)
