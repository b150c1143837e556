"""The protocol over gRPC: `inference.GRPCInferenceService`. Frames and statuses are the host's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from torchserve_dag.direct.open_inference.calls import (
    EXTENSIONS,
    NAME,
    PLATFORM,
    VERSION,
    InferAnswer,
    InferCall,
    OpenInference,
    aside,
)
from torchserve_dag.direct.open_inference.protos import open_inference_grpc_pb2 as pb
from torchserve_dag.direct.open_inference.requests import Caller
from torchserve_dag.direct.open_inference.tensors import (
    BYTES,
    FLOATING,
    InferenceError,
    TensorInfo,
    checked,
    from_raw,
    quoted,
    to_raw,
)

M = TypeVar("M", bound=Message)

SERVICE = "/inference.GRPCInferenceService/"
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}
"""Datatype → the field of InferTensorContents with its elements. The other two are sent raw only."""


async def answer(server: OpenInference, call: str, message: bytes, caller: Caller) -> bytes:
    """The answer to a call of SERVICE, such as `ModelInfer`: messages without frames. Raises InferenceError."""
    if call == "ModelInfer":
        return await _infer(server, message, caller)
    return _asked(server, call, message).SerializeToString()


def _asked(server: OpenInference, call: str, message: bytes) -> Message:
    """The answer to a call that computes nothing."""
    if call == "ServerLive":
        return pb.ServerLiveResponse(live=True)
    if call == "ServerReady":
        return pb.ServerReadyResponse(ready=server.ready())
    if call == "ServerMetadata":
        return pb.ServerMetadataResponse(name=NAME, version=VERSION, extensions=EXTENSIONS)
    if call == "ModelReady":
        asked = _parsed(pb.ModelReadyRequest, message)
        server.entrance(asked.name, asked.version)
        return pb.ModelReadyResponse(ready=True)
    if call == "ModelMetadata":
        about = _parsed(pb.ModelMetadataRequest, message)
        model = server.model(about.name, about.version)
        return pb.ModelMetadataResponse(
            name=model.name,
            versions=[model.version],
            platform=PLATFORM,
            inputs=_metadata(model.inputs),
            outputs=_metadata(model.outputs),
        )
    raise InferenceError(f"{SERVICE[1:-1]} has no call {quoted(call)}.", HTTPStatus.NOT_IMPLEMENTED)


def _parsed(kind: type[M], message: bytes) -> M:
    try:
        return kind.FromString(message)
    except DecodeError:
        raise InferenceError(f"The message is no {kind.__name__}.") from None


def _metadata(infos: Iterable[TensorInfo]) -> list[pb.ModelMetadataResponse.TensorMetadata]:
    kind = pb.ModelMetadataResponse.TensorMetadata
    return [kind(name=info.name, datatype=info.datatype, shape=info.shape) for info in infos]


async def _infer(server: OpenInference, message: bytes, caller: Caller) -> bytes:
    call, raw = await aside(len(message), partial(_read, message))
    inferred = await server.infer(call, caller)
    return await aside(inferred.size, partial(_write, inferred, call.id, raw))


def _read(message: bytes) -> tuple[InferCall, bool]:
    """The call, and whether its tensors were raw. Raises InferenceError."""
    request = _parsed(pb.ModelInferRequest, message)
    raws = request.raw_input_contents
    if raws and (len(raws) != len(request.inputs) or any(each.HasField("contents") for each in request.inputs)):
        raise InferenceError("The raw_input_contents are one for each input, and no input then has contents.")
    if raws:
        inputs = [
            from_raw(each.name, each.datatype, each.shape, raw) for each, raw in zip(request.inputs, raws, strict=True)
        ]
    else:
        inputs = [checked(each.name, each.datatype, each.shape, _contents(each)) for each in request.inputs]
    for output in request.outputs:
        for name in output.parameters:
            what = f"has the parameter {quoted(name)}, which is not known here"
            raise InferenceError(f"The output {quoted(output.name)} {what}.")
    call = InferCall(
        request.model_name,
        request.model_version,
        request.id,
        inputs,
        _parameters(request.parameters),
        [output.name for output in request.outputs],
        len(message),
    )
    return call, bool(raws)


def _contents(tensor: Any) -> list[Any]:
    if tensor.datatype in FLOATING and tensor.datatype not in _CONTENTS:
        raise InferenceError(
            f"The input {quoted(tensor.name)} is {tensor.datatype}, which is sent in raw_input_contents."
        )
    return list(getattr(tensor.contents, _CONTENTS[tensor.datatype])) if tensor.datatype in _CONTENTS else []


def _parameters(said: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {name: value.WhichOneof("parameter_choice") for name, value in said.items()}
    return {name: getattr(said[name], choice) for name, choice in chosen.items() if choice}


def _write(inferred: InferAnswer, call_id: str, raw: bool) -> bytes:  # noqa: FBT001
    """`raw`: whether the tensors are answered so, as those of the call were sent."""
    response = pb.ModelInferResponse(model_name=inferred.name, model_version=inferred.version, id=call_id)
    for tensor in inferred.outputs:
        output = response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if tensor.content_type:
            output.parameters["content_type"].string_param = tensor.content_type
        if raw:
            response.raw_output_contents.append(to_raw(tensor))
        else:
            getattr(output.contents, _CONTENTS[tensor.datatype]).extend(tensor.elements)
    return response.SerializeToString()
