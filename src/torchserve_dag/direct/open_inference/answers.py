"""The model's answers, one for each request of a call, to output tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torchserve_dag.direct.open_inference.signature import Message, TensorKind
from torchserve_dag.direct.open_inference.tensors import BYTES, NoTensorError, Tensor, flattened
from torchserve_dag.runtime.worker.protocol import ServiceResponse

JSON, OCTETS = "application/json", "application/octet-stream"
_INT64 = range(-(2**63), 2**63)


def tensors_of(responses: Sequence[ServiceResponse], answers: Message, names: Sequence[str]) -> list[Tensor]:
    """The outputs `names`, whose first dimension is the responses."""
    if answers.one_value:
        ((name, kind),) = answers.tensors.items()
        if kind.of in {"photo", "bytes", "json"}:
            bodies = [response.body for response in responses]
            types = {response.content_type for response in responses}
            return [Tensor(name, BYTES, [len(bodies)], bodies, types.pop() if len(types) == 1 else OCTETS)]
        return [_tensor(name, kind, [_value(kind, response) for response in responses])]
    messages = [json.loads(response.body) for response in responses]
    return [_tensor(name, answers.tensors[name], [message.get(name) for message in messages]) for name in names]


def _value(kind: TensorKind, response: ServiceResponse) -> Any:
    """An answer that is one value. The chunks of a stream are text as it is."""
    if kind.of == "text" and response.content_type != JSON:
        return {"text": response.body.decode()}
    return json.loads(response.body)


def _tensor(name: str, kind: TensorKind, values: list[Any]) -> Tensor:
    """The values of all requests as an output; in JSON, one BYTES for each, where they have no other form.

    That is so of messages in messages, and of lists whose lengths differ between the requests.
    """
    try:
        shape, elements = flattened(values, kind.depth)
        return Tensor(name, kind.datatype, shape, [_element(kind, element) for element in elements])
    except NoTensorError:
        written = [json.dumps(value, ensure_ascii=False).encode() for value in values]
        return Tensor(name, BYTES, [len(written)], written, JSON)


def _element(kind: TensorKind, value: Any) -> Any:
    """An element of a tensor. Raises NoTensorError for JSON, and another type than the one that was declared."""
    if kind.of == "text" and isinstance(value, dict) and isinstance(text := value.get("text"), str):
        return text.encode()
    if kind.of == "str" and isinstance(value, str):
        return value.encode()
    if kind.of == "bool" and isinstance(value, bool):
        return value
    if kind.of == "int" and type(value) is int and value in _INT64:
        return value
    if kind.of == "float" and type(value) in {int, float}:
        return float(value)
    raise NoTensorError
