"""Input tensors to requests of the model: one for each element of the first dimension."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchserve_dag.direct.open_inference.signature import Message, TensorKind
from torchserve_dag.direct.open_inference.tensors import BYTES, InferenceError, Tensor, nested, quoted
from torchserve_dag.runtime.worker.protocol import Part, ServiceRequest

MAX_REQUESTS = 1_000
"""The most requests in a call."""
_MAX_ID = 120
"""The characters of a call's id to which the number of one of its requests is added."""
_REFUSED_OPTIONS = {
    "x-outputs": "name the outputs in the request",
    "x-cancel": "send it to /predictions/NAME",
}
_JSON = "application/json"
_RAW = {"photo": None, "text": "text/plain; charset=utf-8", "bytes": "application/octet-stream", "json": _JSON}
"""Kind → the content type of an element that is a request's body as it is."""


@dataclass(frozen=True, slots=True)
class Caller:
    """What a call has besides its tensors, whichever protocol it came by."""

    request_id: str
    options: Mapping[str, str] = field(default_factory=dict)
    """As of a ServiceRequest."""
    headers: Mapping[str, str] = field(default_factory=dict)


def requests_of(
    inputs: Sequence[Tensor], parameters: Mapping[str, Any], takes: Message, caller: Caller
) -> list[ServiceRequest]:
    """Raises InferenceError for tensors that are not the model's message."""
    for option, instead in _REFUSED_OPTIONS.items():
        if option in caller.options:
            raise InferenceError(f"The header {option} is not for this protocol: {instead}.")
    tensors = _by_name(inputs, takes)
    sizes = {tensor.shape[0] for tensor in tensors.values()}
    if len(sizes) > 1:
        said = ", ".join(f"{name} {tensor.shape[0]}" for name, tensor in tensors.items())
        raise InferenceError(f"The first dimension is the requests, and the same for all inputs; it is {said}.")
    (count,) = sizes or {0}
    if not 0 < count <= MAX_REQUESTS:
        raise InferenceError(
            f"The call has {count:,} requests, which are its first dimension: send 1 to {MAX_REQUESTS:,}."
        )
    values = {name: _values(tensor, takes.tensors[name], count) for name, tensor in tensors.items()}
    about = {name: value if isinstance(value, str) else json.dumps(value) for name, value in parameters.items()}
    made = []
    for i in range(count):
        request_id = caller.request_id if count == 1 else f"{caller.request_id[:_MAX_ID]}-{i}"
        try:
            body, content_type, parts = _content({name: each[i] for name, each in values.items()}, takes)
        except InferenceError as error:
            raise InferenceError(at_element(i, count, error.message)) from None
        made.append(
            ServiceRequest(request_id, body, content_type, None, about, caller.options, parts, headers=caller.headers)
        )
    return made


def at_element(i: int, count: int, message: str) -> str:
    """A sentence about one of a call's requests."""
    return message if count == 1 else f"Element {i} of {count:,}, counted from 0: {message}"


def _by_name(inputs: Sequence[Tensor], takes: Message) -> dict[str, Tensor]:
    known = takes.tensors
    tensors: dict[str, Tensor] = {}
    for tensor in inputs:
        if tensor.name not in known:
            raise InferenceError(f"There is no input {quoted(tensor.name)}: the inputs are {', '.join(known)}.")
        if tensor.name in tensors:
            raise InferenceError(f"The input {quoted(tensor.name)} came twice.")
        tensors[tensor.name] = tensor
    missing = [name for name in known if name not in tensors and name not in takes.optional]
    if missing or not tensors:
        raise InferenceError(f"The input {', '.join(map(quoted, missing or known))} is missing.")
    return tensors


def _values(tensor: Tensor, kind: TensorKind, count: int) -> list[Any]:
    """Of each request: an element, or lists of them."""
    if tensor.datatype not in kind.accepted:
        one_of = " or ".join(kind.accepted)
        raise InferenceError(f"The input {quoted(tensor.name)} is {one_of}, not {tensor.datatype}.")
    shape = tensor.shape[1:]
    about = f"The input {quoted(tensor.name)} has the shape {list(tensor.shape)}"
    if len(shape) != kind.depth:
        lists = f"{1 + kind.depth} dimensions are needed: the requests, then those of its lists"
        raise InferenceError(f"{about}, and {lists if kind.depth else '1 dimension is needed: the requests'}.")
    if 0 in shape[1:]:
        raise InferenceError(f"{about}: its lists hold nothing.")
    size = len(tensor.elements) // count
    return [nested(tensor.elements[i * size : (i + 1) * size], shape) for i in range(count)]


def _content(values: Mapping[str, Any], takes: Message) -> tuple[bytes, str | None, list[Part] | None]:
    """A request's body and content type, or its parts. Raises InferenceError."""
    kinds = takes.tensors
    if takes.one_value:
        ((name, value),) = values.items()
        return *_body(name, kinds[name], value), None
    if any(kind.of in {"photo", "bytes"} for kind in kinds.values()):
        return b"", None, [_part(name, kinds[name], value) for name, value in values.items()]
    fields = (f"{json.dumps(name)}: {_json(name, kinds[name], value)}" for name, value in values.items())
    return f"{{{', '.join(fields)}}}".encode(), _JSON, None


def _body(name: str, kind: TensorKind, value: Any) -> tuple[bytes, str | None]:
    return (value, _RAW[kind.of]) if kind.of in _RAW else (_json(name, kind, value).encode(), _JSON)


def _part(name: str, kind: TensorKind, value: Any) -> Part:
    if kind.of == "str" and not kind.depth:  # a part of text is its characters
        return Part(name, value)
    return Part(name, *_body(name, kind, value))


def _json(name: str, kind: TensorKind, value: Any) -> str:
    """A value as JSON. Raises InferenceError."""
    try:
        if kind.of == "json":
            text: str = value.decode()
            json.loads(text)  # else it could add fields to the message that it is put into
            return text
        if kind.datatype == BYTES:
            value = _decoded(value)
        return json.dumps({"text": value} if kind.of == "text" else value, ensure_ascii=False, allow_nan=False)
    except UnicodeDecodeError:
        raise InferenceError(f"The input {quoted(name)} is not UTF-8.") from None
    except (ValueError, RecursionError):
        what = "is not JSON" if kind.of == "json" else "has a number that is not finite"
        raise InferenceError(f"The input {quoted(name)} {what}.") from None


def _decoded(value: Any) -> Any:
    return [_decoded(element) for element in value] if isinstance(value, list) else value.decode()
