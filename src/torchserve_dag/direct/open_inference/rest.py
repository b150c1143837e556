"""The protocol over REST: JSON, and Triton's binary tensors after it."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

from torchserve_dag.direct.open_inference.answers import JSON, OCTETS
from torchserve_dag.direct.open_inference.calls import (
    EXTENSIONS,
    NAME,
    PLATFORM,
    VERSION,
    InferAnswer,
    InferCall,
    ModelMetadata,
    OpenInference,
    aside,
)
from torchserve_dag.direct.open_inference.requests import Caller
from torchserve_dag.direct.open_inference.tensors import (
    BYTES,
    InferenceError,
    NoTensorError,
    Tensor,
    checked,
    flattened,
    from_raw,
    quoted,
    shortened,
    to_raw,
)
from torchserve_dag.runtime.worker.protocol import ServiceResponse

T = TypeVar("T")

ROOT = "/v2"
JSON_LENGTH = "Inference-Header-Content-Length"
"""The header with the bytes of the JSON, after which the binary tensors follow."""
BASE64 = "base64"
"""The content type of a tensor whose bytes are written in base64, for they are no text."""
_VERSION_AT = 3
_DIGITS = 18
_BINARY, _ALL_BINARY, _SIZE, _CONTENT_TYPE = "binary_data", "binary_data_output", "binary_data_size", "content_type"


async def answer(server: OpenInference, method: str, path: str, body: bytes, caller: Caller) -> ServiceResponse:
    """The answer to a call, which may be a failure. `path` is without percent-encoding."""
    try:
        return await _answer(server, method, path, body, caller)
    except InferenceError as error:
        return failure(error)


def failure(error: InferenceError) -> ServiceResponse:
    return _json({"error": error.message}, error.status, error.headers)


async def _answer(server: OpenInference, method: str, path: str, body: bytes, caller: Caller) -> ServiceResponse:
    words = [word for word in path.removeprefix(ROOT).split("/") if word]
    version = ""
    if words[2:3] == ["versions"] and len(words) > _VERSION_AT:
        version = words[_VERSION_AT]
        words[2 : _VERSION_AT + 1] = []
    match [method, *words]:
        case ["GET"]:
            return _json({"name": NAME, "version": VERSION, "extensions": list(EXTENSIONS)})
        case ["GET", "health", "live"]:
            return _json({"live": True})
        case ["GET", "health", "ready"]:
            ready = server.ready()
            return _json({"ready": ready}, HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE)
        case ["GET", "models", name]:
            return _json(_metadata(server.model(name, version)))
        case ["GET", "models", name, "ready"]:
            service = server.entrance(name, version).service
            return _json({"name": service.name, "ready": True})
        case ["POST", "models", name, "infer"]:
            return await _infer(server, name, version, body, caller)
        case [_] | [_, "health", "live" | "ready"] | [_, "models", _] | [_, "models", _, "ready" | "infer"]:
            message = f"An inference is a POST, and everything else a GET; this is {shortened(method)}."
            raise InferenceError(message, HTTPStatus.METHOD_NOT_ALLOWED)
    raise InferenceError("There is nothing at this path.", HTTPStatus.NOT_FOUND)


def _json(
    fields: Mapping[str, Any], status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None
) -> ServiceResponse:
    return ServiceResponse(json.dumps(fields).encode(), JSON, int(status), headers or {})


def _metadata(model: ModelMetadata) -> dict[str, Any]:
    tensors = {"inputs": [asdict(info) for info in model.inputs], "outputs": [asdict(info) for info in model.outputs]}
    return {"name": model.name, "versions": [model.version], "platform": PLATFORM, **tensors}


async def _infer(server: OpenInference, name: str, version: str, body: bytes, caller: Caller) -> ServiceResponse:
    if caller.headers.get("content-encoding", "identity").lower() != "identity":
        message = "An inference cannot be compressed: send it without Content-Encoding."
        raise InferenceError(message, HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
    length = caller.headers.get(JSON_LENGTH.lower())
    read = await aside(len(body), partial(_read, body, length, name, version))
    inferred = await server.infer(read.call, caller)
    return await aside(inferred.size, partial(_write, inferred, read))


@dataclass(frozen=True, slots=True)
class _RestCall:
    """An inference as it was sent."""

    call: InferCall
    all_binary: bool
    """Whether outputs are answered as binary tensors, but for those that `binary` names."""
    binary: Mapping[str, bool]

    def is_binary(self, output: str) -> bool:
        return self.binary.get(output, self.all_binary)


def _read(body: bytes, length: str | None, model: str, version: str) -> _RestCall:
    """Raises InferenceError."""
    end = len(body)
    if length is not None:
        is_number = length.isascii() and length.isdigit() and len(length) <= _DIGITS
        if not is_number or int(length) > end:
            raise InferenceError(f"The header {JSON_LENGTH} is the length of the JSON, and the body has {end:,} bytes.")
        end = int(length)
    try:
        data = json.loads(body[:end])
    except (ValueError, RecursionError) as error:
        raise InferenceError(f"The request is not valid JSON: {error}.") from None
    request = _Fields(data, "the request")
    parameters = request.get("parameters", dict, {})
    outputs = [_Fields(output, "an output") for output in request.get("outputs", list, [])]
    asked = {output.get("name", str): output.get("parameters", dict, {}) for output in outputs}
    for name, said in asked.items():
        if unknown := said.keys() - {_BINARY}:
            raise InferenceError(
                f"The output {quoted(name)} has the parameter {quoted(min(unknown))}, which is not known here."
            )
    inputs, at = [], end
    for each in request.get("inputs", list):
        size = _Fields(each, "an input").get("parameters", dict, {}).get(_SIZE)
        if size is not None and not (type(size) is int and 0 <= size <= len(body) - at):
            raise InferenceError(f"The {_SIZE} of an input is more than the body has left after its JSON.")
        inputs.append(_input(_Fields(each, "an input"), None if size is None else memoryview(body)[at : at + size]))
        at += size or 0
    if at != len(body):
        raise InferenceError(f"{len(body) - at:,} bytes follow the JSON, of which no {_SIZE} tells.")
    call = InferCall(
        model,
        version,
        request.get("id", str, ""),
        inputs,
        {name: value for name, value in parameters.items() if name != _ALL_BINARY},
        list(asked),
        len(body),
    )
    binary = {name: said[_BINARY] is True for name, said in asked.items() if _BINARY in said}
    return _RestCall(call, parameters.get(_ALL_BINARY) is True, binary)


class _Fields:
    """A JSON object of a request. Raises InferenceError for what is not as it should be."""

    def __init__(self, data: Any, what: str) -> None:
        if not isinstance(data, dict):
            raise InferenceError(f"The request is not right: {what} is no JSON object.")
        self._data, self._what = data, what

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """`default` where there is none, or null."""
        value = self._data.get(name)
        value = default if value is None else value
        if not isinstance(value, kind):
            called = "text" if kind is str else "a list" if kind is list else "a JSON object"
            raise InferenceError(f"The request is not right: {self._what} has no {name}, which is {called}.")
        return value


def _input(fields: _Fields, raw: memoryview | None) -> Tensor:
    """Raises InferenceError."""
    name, datatype, shape = fields.get("name", str), fields.get("datatype", str), fields.get("shape", list)
    if not all(type(size) is int for size in shape):
        raise InferenceError(f"The shape of the input {quoted(name)} is a list of whole numbers.")
    if raw is not None:
        return from_raw(name, datatype, shape, raw)
    data = fields.get("data", list)
    if any(isinstance(element, list) for element in data):
        try:
            found, data = flattened(data, len(shape) - 1)
        except NoTensorError:
            found = []
        if found != shape:
            raise InferenceError(f"The data of the input {quoted(name)} are lists of another shape than {shape[:10]}.")
    if datatype == BYTES:
        coded = fields.get("parameters", dict, {}).get(_CONTENT_TYPE) == BASE64
        data = [_bytes(name, element, coded) for element in data]
    return checked(name, datatype, shape, data)


def _bytes(name: str, element: Any, coded: bool) -> bytes:  # noqa: FBT001
    if not isinstance(element, str):
        raise InferenceError(f"The input {quoted(name)} is BYTES, whose elements are texts in JSON.")
    try:
        return base64.b64decode(element, validate=True) if coded else element.encode()
    except (binascii.Error, UnicodeEncodeError):
        what = "is not base64" if coded else "has half a surrogate pair"
        raise InferenceError(f"The input {quoted(name)} {what}.") from None


def _write(inferred: InferAnswer, read: _RestCall) -> ServiceResponse:
    outputs, raws = [], []
    for tensor in inferred.outputs:
        fields: dict[str, Any] = {"name": tensor.name, "shape": tensor.shape, "datatype": tensor.datatype}
        parameters: dict[str, Any] = {_CONTENT_TYPE: tensor.content_type} if tensor.content_type else {}
        if read.is_binary(tensor.name):
            raws.append(to_raw(tensor))
            parameters[_SIZE] = len(raws[-1])
        elif tensor.datatype != BYTES:
            fields["data"] = tensor.elements
        elif not tensor.content_type or "json" in tensor.content_type:
            fields["data"] = [element.decode() for element in tensor.elements]
        else:
            fields["data"] = [base64.b64encode(element).decode() for element in tensor.elements]
            parameters[_CONTENT_TYPE] = BASE64
        outputs.append(fields | {"parameters": parameters} if parameters else fields)
    answered = {"model_name": inferred.name, "model_version": inferred.version, "outputs": outputs}
    written = json.dumps({"id": read.call.id, **answered} if read.call.id else answered).encode()
    if not raws:
        return ServiceResponse(written, JSON)
    headers = {JSON_LENGTH: str(len(written))}
    return ServiceResponse(b"".join([written, *raws]), OCTETS, headers=headers)
