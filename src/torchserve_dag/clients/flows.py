"""What each method of a client asks and makes of the answers, without any input or output of its own.

A flow is a generator: it yields a call, is sent the answer's body, and returns the method's result. So one
text of it serves the plain and the asyncio clients, over REST and gRPC.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from torchserve_dag.clients.bodies import Body, answer_as, body_of
from torchserve_dag.clients.errors import (
    ConnectionLost,
    DeadlineExceeded,
    ModelNotFound,
    ServerFailed,
    Unreachable,
    unexpected_answer,
)
from torchserve_dag.clients.models import ModelInfo, model_info, version_info

T = TypeVar("T")
PAGE = 100
"""Models asked for at a time; it is TorchServe's limit."""


@dataclass(frozen=True, slots=True)
class Predict:
    name: str
    version: str | None
    body: Body
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ping:
    pass


@dataclass(frozen=True, slots=True)
class ListModels:
    page: int


@dataclass(frozen=True, slots=True)
class Describe:
    name: str
    version: str | None
    customized: bool = False


@dataclass(frozen=True, slots=True)
class SetDefault:
    name: str
    version: str


Call: TypeAlias = Predict | Ping | ListModels | Describe | SetDefault
Flow: TypeAlias = Generator[Call, bytes, T]


def prediction(name: str, message: Any, version: str | None, parameters: Mapping[str, str] | None) -> Predict:
    parameters = dict(parameters or {})
    if "body" in parameters:
        raise ValueError('a parameter may not be named "body": that is the message itself')
    return Predict(name, version, body_of(message), parameters)


def predict(call: Predict, answer: type[T] | None) -> Flow[T | Any]:
    return answer_as(answer, (yield call))


def ready(name: str | None, version: str | None) -> Flow[bool]:
    try:
        if name is None:
            return bool(_data((yield Ping())).get("status") == "Healthy")
        (described,) = _data((yield Describe(name, version)))
        return version_info(described, default=False).ready
    except (Unreachable, ConnectionLost, DeadlineExceeded, ModelNotFound, ServerFailed):
        return False  # an unhealthy server answers a ping with 500


def models() -> Flow[list[ModelInfo]]:
    names: list[str] = []
    page: int | None = 0
    while page is not None:
        listed = _data((yield ListModels(page)))
        names += [model["modelName"] for model in listed["models"]]
        page = int(listed["nextPageToken"]) if "nextPageToken" in listed and listed["models"] else None
    infos: list[ModelInfo] = []
    for name in names:
        try:
            every = _data((yield Describe(name, "all")))
            # Only a description without a version tells which one is the default.
            (default,) = every if len(every) == 1 else _data((yield Describe(name, None)))
        except ModelNotFound:
            continue  # unregistered since it was listed
        infos.append(model_info(name, every, default["modelVersion"]))
    return infos


def describe(name: str, version: str | None) -> Flow[dict[str, Any]]:
    (described,) = _data((yield Describe(name, version, customized=True)))
    return dict(described)


def set_default(name: str, version: str) -> Flow[None]:
    yield SetDefault(name, version)


def _data(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        raise unexpected_answer(f"The answer is not TorchServe's: {body[:80]!r}. Is this its address?") from None
