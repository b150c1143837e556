"""What each client method sends, and what it returns for the answers, without doing any I/O.

A flow is a generator: it yields a call, is sent the answer's body, and returns the method's result. So the plain
and the asyncio clients, over REST and gRPC, share its code.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
import uuid
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias, TypeVar

from torchserve_dag.clients.bodies import answer_as, body_of
from torchserve_dag.clients.errors import (
    ConnectionLost,
    DeadlineExceeded,
    ModelNotFound,
    ServerFailed,
    ServingError,
    UnexpectedAnswer,
    Unreachable,
    unexpected_answer,
)
from torchserve_dag.clients.models import ModelInfo, model_info, version_info
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.options import CANCEL, HEADERS, Options
from torchserve_dag.runtime.data.parts import BODY, PARAMETER, Body, Parts

T = TypeVar("T")
_HEADER = re.compile(r"[a-z0-9-]+")
PAGE = 100
"""Models in one answer of `ListModels`; TorchServe's limit."""


@dataclass(frozen=True, slots=True)
class Predict:
    name: str
    version: str | None
    body: Body | Parts
    parameters: Mapping[str, str] = field(default_factory=dict)
    options: Options = field(default_factory=Options)

    def parts(self) -> dict[str, Body]:
        """The message and the parameters by name, as a form and gRPC's map have them."""
        if isinstance(self.body, Body):
            message, prefix = {BODY: self.body}, ""
        else:
            message, prefix = dict(self.body.fields), PARAMETER
        return message | {prefix + key: Body(value.encode()) for key, value in self.parameters.items()}

    def body_is_json(self) -> bool:
        """Whether the message is one JSON body."""
        return isinstance(self.body, Body) and self.body.content_type == "application/json"

    def asks(self, left_s: float) -> dict[str, str]:
        """The options to send, with the time that the client still waits."""
        limit = min(left_s, self.options.timeout_s or left_s)
        return dataclasses.replace(self.options, timeout_s=limit).headers()


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancels the prediction that was sent with `key`. It is sent like a prediction."""

    body: ClassVar[Body] = Body(b"{}", "application/json")
    parameters: ClassVar[Mapping[str, str]] = {}

    name: str
    version: str | None
    key: str
    route_by: Mapping[str, str] = field(default_factory=dict)

    def parts(self) -> dict[str, Body]:
        return {BODY: self.body}

    def body_is_json(self) -> bool:
        return False  # its body is nobody's message

    @property
    def options(self) -> Options:
        """The options that route the cancellation to the version that has the prediction."""
        return Options(route_by={**self.route_by, CANCEL: self.key})

    def asks(self, left_s: float) -> dict[str, str]:  # noqa: ARG002 (as Predict)
        return {CANCEL: self.key}


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


@dataclass(frozen=True, slots=True)
class Register:
    archive: str


@dataclass(frozen=True, slots=True)
class Unregister:
    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Feedback:
    """A score for an answer, which the front door logs. Over REST only."""

    request_id: str
    score: float


Call: TypeAlias = Predict | Cancel | Ping | ListModels | Describe | SetDefault | Register | Unregister | Feedback
Flow: TypeAlias = Generator[Call, bytes, T]


def prediction(
    name: str,
    message: Any,
    version: str | None,
    parameters: Mapping[str, str] | None,
    options: Options | None,
    answer: Any,
) -> Predict:
    parameters, options = dict(parameters or {}), options or Options()
    if "body" in parameters:
        raise ValueError('a parameter may not be named "body": that is the message itself')
    for parameter in parameters:
        if parameter.lower() in HEADERS:
            raise ValueError(f'a parameter may not be named "{parameter}": give it among the options')
    if options.timeout_s is not None and options.timeout_s <= 0:
        raise ValueError(f"timeout_s is more than 0, not {options.timeout_s}")
    for header, value in {**options.headers(), **options.route_by}.items():
        if not _HEADER.fullmatch(header):
            raise ValueError(f'"{header}" cannot be a header: use small letters, digits and dashes')
        if not (value.isascii() and value.isprintable()):
            raise ValueError(f"{value!r} cannot be sent as {header}: a header is plain ASCII")
    _check_answer(answer, options.outputs)
    return Predict(name, version, body_of(message), parameters, options)


def streamed(call: Predict) -> Predict:
    """The prediction with a cancel key, so that it can be cancelled: its own, or else a new one."""
    options = dataclasses.replace(call.options, cancel_key=call.options.cancel_key or uuid.uuid4().hex)
    return dataclasses.replace(call, options=options)


def cancellation(call: Predict, error: BaseException) -> Cancel | None:
    """The call that cancels a stream after `error`; None if the server has ended the stream already."""
    ended = isinstance(error, ServingError) and not isinstance(error, DeadlineExceeded | UnexpectedAnswer)
    key = call.options.cancel_key
    return None if ended or key is None else Cancel(call.name, call.version, key, call.options.route_by)


def predict(call: Predict, answer: type[T] | None) -> Flow[T | Any]:
    return answer_as(answer, (yield call))


def ready(name: str | None, version: str | None) -> Flow[bool]:
    try:
        if name is None:
            health = yield Ping()
            # The front door caches TorchServe's status for a second, without the body.
            return not health or _data(health).get("status") == "Healthy"
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
            # Only a description without a version tells which version is the default.
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


def register(archive: str) -> Flow[None]:
    yield Register(archive)


def unregister(name: str, version: str) -> Flow[None]:
    yield Unregister(name, version)


def feedback(request_id: str, score: float) -> Flow[None]:
    if not math.isfinite(score):
        raise ValueError(f"a score is a number, not {score}")
    yield Feedback(request_id, float(score))


def _check_answer(answer: Any, outputs: tuple[str, ...]) -> None:
    """Raises TypeError if a dict of the results of `outputs` cannot be read as an `answer`."""
    if not outputs or answer in {None, Any, bytes, dict} or typing.get_origin(answer) is dict:
        return
    if not dataclasses.is_dataclass(answer) or not set(outputs) <= plain.field_types(answer).keys():  # type: ignore[arg-type]
        what = f"a dict, or a dataclass with the fields {', '.join(outputs)}, not {plain.name_of(answer)}"
        raise TypeError(f"with outputs, the answer holds the result of each by its name: let `answer` be {what}")


def _data(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        raise unexpected_answer(f"The answer is not from TorchServe: {body[:80]!r}. Is this its address?") from None
