"""The JSON of a client's request as a message of ours: what is not known, or has no effect here, is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from http import HTTPStatus
from typing import Any, TypeVar

from torchserve_dag.gateway.errors import ApiError
from torchserve_dag.runtime.data import plain, strict_json

T = TypeVar("T")
LABELS = frozenset({"user", "safety_identifier", "prompt_cache_key"})
"""Fields that name the client's user, and change no answer."""
NEUTRAL: Mapping[str, Collection[Any]] = {"store": (False,), "service_tier": ("auto", "default")}
"""Fields that may only say what holds anyway."""


def read_json(body: bytes) -> dict[str, Any]:
    """A request's fields, without those that are null. Raises ApiError."""
    try:
        data = strict_json.parse(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"The body is not UTF-8: {error.reason}.") from None
    except ValueError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"The body is not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise ApiError(HTTPStatus.BAD_REQUEST, "The body is a JSON object with the field model.")
    return {name: value for name, value in data.items() if value is not None}


def take(data: dict[str, Any], name: str, kind: type[T], default: T) -> T:
    """Take a field out of a request. Raises ApiError."""
    value = data.pop(name, default)
    if type(value) is not kind:
        shown = plain.name_of(type(value))
        raise ApiError(HTTPStatus.BAD_REQUEST, f"{name}: expected {kind.__name__}, not {shown}.", param=name)
    return value


def model_in(data: dict[str, Any]) -> str:
    """The model that a request names. Raises ApiError."""
    model = take(data, "model", str, "")
    if not model:
        raise ApiError(HTTPStatus.BAD_REQUEST, "model: it is missing; GET /v1/models has their names.", param="model")
    return model


def drop_neutral(data: dict[str, Any], neutral: Mapping[str, Collection[Any]] = NEUTRAL) -> None:
    """Take out what changes nothing. Raises ApiError for a field that asks for something else than what holds."""
    for name in LABELS:
        take(data, name, str, "")
    for name, values in neutral.items():
        if name in data and data.pop(name) not in values:
            said = " or ".join(str(value) for value in values)
            raise ApiError(HTTPStatus.BAD_REQUEST, f"{name}: leave it out, or write {said}.", param=name)


def include_usage(data: dict[str, Any], *, stream: bool) -> bool:
    """Whether `stream_options` ask for the usage. Raises ApiError."""
    options = take(data, "stream_options", dict, {})
    if options and not stream:
        message = "stream_options: they belong to a request with stream: true."
        raise ApiError(HTTPStatus.BAD_REQUEST, message, param="stream_options")
    wanted = take(options, "include_usage", bool, default=False)
    take(options, "include_obfuscation", bool, default=False)
    if options:
        unknown(next(iter(options)), "stream_options.")
    return wanted


def message_of(kind: type[T], data: dict[str, Any], *, status: int = HTTPStatus.BAD_REQUEST) -> T:
    """The rest of a request as a message. Raises ApiError, which names the field."""
    if "adapter" in data:  # which the model's name has
        unknown("adapter")
    try:
        return plain.build(kind, data)
    except plain.WrongDataError as error:
        first = error.wrongs[0]
        if first.at_key and len(first.path) == 1:
            unknown(str(first.path[0]))
        where = plain.dotted(first.path)
        message = f"{where}: {first.what}" if where else first.what
        raise ApiError(status, f"{message}{'; ' if first.help else ''}{first.help}.", param=where or None) from None


def unknown(name: str, before: str = "") -> None:
    """Raises ApiError: there is no such field here."""
    message = f"{before}{name[:100]}: this field is not supported here; leave it out."
    raise ApiError(HTTPStatus.BAD_REQUEST, message, param=f"{before}{name[:100]}", code="unsupported_parameter")


def without_nulls(value: Any) -> Any:
    """The same without keys that are null: clients send back answers, which have such keys."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value
