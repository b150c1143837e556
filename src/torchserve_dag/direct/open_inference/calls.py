"""What is asked of the server or a model, whichever protocol the call came by."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from importlib import metadata
from typing import Any, TypeVar

from torchserve_dag.direct.entrance import Entrance, InFlight
from torchserve_dag.direct.open_inference.answers import tensors_of
from torchserve_dag.direct.open_inference.requests import Caller, at_element, requests_of
from torchserve_dag.direct.open_inference.signature import ModelSignature
from torchserve_dag.direct.open_inference.tensors import InferenceError, Tensor, TensorInfo, shortened
from torchserve_dag.runtime.worker.protocol import ServiceResponse

T = TypeVar("T")

NAME = "torchserve-dag"
VERSION = metadata.version(NAME)
EXTENSIONS = ("binary_tensor_data",)
PLATFORM = f"{NAME}_mar"
MAX_ANSWER = 64 * 2**20
"""The most bytes of a call's answers together."""
LARGE = 64 * 2**10
"""Bytes of tensors that are converted on a thread, so that the event loop goes on meanwhile."""


@dataclass(frozen=True, slots=True)
class InferCall:
    model: str
    version: str
    """Empty: the version that the host chooses."""
    id: str
    """The client's own, which the answer repeats."""
    inputs: Sequence[Tensor]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Texts, numbers and booleans: the parameters of each request."""
    outputs: Sequence[str] = ()
    """The names of the outputs that the client asked for; none: all."""
    size: int = 0
    """How many bytes its tensors came in."""


@dataclass(frozen=True, slots=True)
class InferAnswer:
    name: str
    version: str
    outputs: Sequence[Tensor]
    size: int
    """How many bytes the model's answers had."""


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    name: str
    version: str
    inputs: Sequence[TensorInfo]
    outputs: Sequence[TensorInfo]


class OpenInference:
    """The calls of the protocol, but for their form. Each raises InferenceError."""

    def __init__(self, find: Callable[[str, str | None], Entrance | None], why_not_ready: Callable[[], str]) -> None:
        """As of DirectApp."""
        self._find, self._why_not_ready = find, why_not_ready

    def ready(self) -> bool:
        return not self._why_not_ready()

    def entrance(self, name: str, version: str) -> Entrance:
        """The model, which is ready: what is not loaded is not found."""
        entrance = self._find(name, version or None)
        if entrance is None:
            what = f"version {shortened(version)} of {shortened(name)}" if version else shortened(name)
            raise InferenceError(f"Model not found: {what}", HTTPStatus.NOT_FOUND)
        return entrance

    def model(self, name: str, version: str) -> ModelMetadata:
        service = self.entrance(name, version).service
        signature = ModelSignature.read(service.describe())
        return ModelMetadata(service.name, service.version, signature.takes.infos(), signature.answers.infos())

    async def infer(self, call: InferCall, caller: Caller) -> InferAnswer:
        """Cancelling it cancels its requests."""
        entrance = self.entrance(call.model, call.version)
        signature = ModelSignature.read(entrance.service.describe())
        names = signature.outputs(call.outputs)
        requests = await aside(call.size, partial(requests_of, call.inputs, call.parameters, signature.takes, caller))
        responses = await _responses([entrance.submit(request, in_chunks=False) for request in requests])
        size = sum(len(response.body) for response in responses)
        outputs = await aside(size, partial(tensors_of, responses, signature.answers, names))
        return InferAnswer(entrance.service.name, entrance.service.version, outputs, size)


async def _responses(in_flight: Sequence[InFlight]) -> list[ServiceResponse]:
    """All responses in their order. Where one is a failure, the call fails with it, and the rest is cancelled."""
    responses: list[ServiceResponse] = []
    size = 0
    try:
        for one in in_flight:
            response = await one.next()
            assert isinstance(response, ServiceResponse)  # noqa: S101 (none was submitted in chunks)
            if response.status >= HTTPStatus.BAD_REQUEST:
                raise _failure(response, len(responses), len(in_flight))
            size += len(response.body)
            if size > MAX_ANSWER:
                what = f"The answers are together larger than {MAX_ANSWER:,} bytes"
                raise InferenceError(f"{what}: send fewer requests in a call.", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            responses.append(response)
    finally:
        for one in in_flight[len(responses) :]:
            one.cancel()
    return responses


def _failure(response: ServiceResponse, i: int, count: int) -> InferenceError:
    """A model's failure, which it wrote as JSON."""
    message = json.loads(response.body)["message"]
    return InferenceError(at_element(i, count, message), response.status, response.headers)


async def aside(size: int, work: Callable[[], T]) -> T:
    """`work` with `size` bytes: now if they are few, else on a thread."""
    return await asyncio.to_thread(work) if size > LARGE else work()
