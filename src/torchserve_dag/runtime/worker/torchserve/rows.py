"""TorchServe's requests as ServiceRequests: the body or the parts, the content type and the options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchserve_dag.runtime.compat.wire import WireRequest
from torchserve_dag.runtime.data import media
from torchserve_dag.runtime.data.options import CANCEL, CONTENT_TYPE, NAMES, PIECES, named, owned_keys
from torchserve_dag.runtime.data.parts import BODY
from torchserve_dag.runtime.worker.protocol import Part, Service, ServiceRequest, ServiceResponse
from torchserve_dag.runtime.worker.response import write_answer


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
    """Read a request from its row and its headers.

    Its id is the client's `x-request-id`, and TorchServe's own id where the client sent none.
    """
    headers = {name.lower(): value for name, value in wire.headers.items() if isinstance(value, str)}
    options: dict[str, str] = {}  # over gRPC they are entries of the map; a form may have them, too
    parts: list[Part] = []
    entry_type = None  # of the body over gRPC, whose messages have no other place for it
    for name, value in wire.row.items():
        part = _part(name, value, wire.headers.get(name))
        if name != BODY and (option := name.lower()) in NAMES:
            options[option] = part.content.decode("utf-8", "replace")
        elif name.lower() == CONTENT_TYPE:
            entry_type = part.content.decode("utf-8", "replace")
        else:
            parts.append(part)
    options.update(headers)
    content_type = headers.get("content-type")
    is_body = len(parts) == 1 and parts[0].name == BODY and not wire.repeated
    if is_body and media.media_of(content_type) != media.FORM:
        (body,) = parts
        if content_type and content_type.startswith(body.content_type or "\0"):
            content_type = content_type.replace(media.FORM_AS_SENT, media.FORM)  # with the charset, which parts lack
        else:  # a form's own type is not its part's
            content_type = body.content_type or entry_type
        content, form = body.content, None
    else:
        content, form = b"", parts
    return TorchServeRequest(
        named(options) or wire.id,
        content,
        content_type,
        headers.get("content-encoding"),
        options=owned_keys(options),
        parts=form,
        repeated=wire.repeated,
        headers=wire.headers,
        rest=over_rest(headers),
        describes=wire.headers.get("describe") == "True",
    )


def _part(name: str, value: Any, about: Any) -> Part:
    """A part of a row. It may be decoded already, where another worker runs this one: JSON to data, text to a str."""
    content_type = about.get("content-type") if isinstance(about, Mapping) else None
    if isinstance(value, bytes | bytearray):
        content = bytes(value)
    elif isinstance(value, str) and not media.is_json(media.media_of(content_type)):
        content = value.encode()
    else:
        content = json.dumps(value).encode()
    return Part(name, content, content_type or None)


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
