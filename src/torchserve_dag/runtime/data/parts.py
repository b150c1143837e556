"""A request as its client sent it, whole or in the parts of a form, as a message."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from torchserve_dag.runtime.data import codec, media, photos, plain, strict_json
from torchserve_dag.runtime.data.content_encoding import decompressed
from torchserve_dag.runtime.messages import InputError, Photo, Text

T = TypeVar("T")

BODY = "body"
"""The part that is the whole message: so TorchServe calls a raw body."""
BODY_NAMES = (BODY, "data")
"""Clients of TorchServe call a form's part `data`."""
PARAMETER = "parameters."
"""What a part's name may begin with, so that the part is a parameter and no field of the message."""


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body, or one part of a form."""

    content: bytes
    content_type: str | None = None
    encoding: str | None = None
    """Its `Content-Encoding`."""


@dataclass(frozen=True, slots=True)
class Parts:
    """A message in parts: one for each of its fields."""

    fields: Mapping[str, Body]


def message_in(kind: Any, parts: Mapping[str, Body]) -> tuple[Body | Parts, dict[str, str]]:
    """The message among the parts of a form, or of gRPC's map, and the others, which are its parameters.

    The message is the part called `body` or `data`, a lone part, the only part that is a file, or, for a message with
    fields, the parts called as the fields are. Raises InputError where nothing of that fits.
    """
    message = {name: part for name, part in parts.items() if not name.startswith(PARAMETER)}
    parameters = {name.removeprefix(PARAMETER): part for name, part in parts.items() if name not in message}
    found: Body | Parts
    if _in_fields(kind, message):
        found = Parts(message)
    else:
        key = _body_among(kind, message)
        found = message.pop(key) if key is not None else Body(b"")
        parameters |= message
    return found, {name: part.content.decode("utf-8", "replace") for name, part in parameters.items()}


def read(kind: type[T], message: Body | Parts, *, max_pixels: int = photos.MAX_PIXELS) -> T:
    """The message of type `kind`. `max_pixels`: of a photo. Raises InputError."""
    if isinstance(message, Body):
        content = decompressed(message.content, message.encoding)
        return codec.decode(kind, content, message.content_type, max_pixels=max_pixels)
    types, values, wrongs = plain.field_types(kind), {}, []  # type: ignore[arg-type]
    for name, part in message.fields.items():
        try:
            values[name] = _field(plain.given(types[name]), part, max_pixels)
        except InputError as error:
            error.message = f"The part {name}: {error.message}"
            raise
        except plain.WrongDataError as error:
            wrongs.append(f"{name}: {error}")
    wrongs += [f'"{name}" is missing' for name in plain.missing(kind, message.fields)]
    if not wrongs:
        try:
            return kind(**values)
        except ValueError as error:  # a dataclass's own __post_init__ says no
            wrongs.append(str(error))
    raise InputError(f"The form does not fit: {'; '.join(wrongs)}.", HTTPStatus.UNPROCESSABLE_ENTITY)


def fields_apart(message: Any) -> dict[str, Any] | None:
    """The fields of a message that JSON cannot hold, because a photo, bytes or a file are among them, without those
    that are None; the message is sent in parts, one for each. None for any other message.
    """
    if isinstance(message, Mapping):
        fields = dict(message)
    elif dataclasses.is_dataclass(message) and not isinstance(message, Photo | type):
        fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    else:
        return None
    apart = any(isinstance(value, Photo | Path | bytes | bytearray | memoryview) for value in fields.values())
    return {name: value for name, value in fields.items() if value is not None} if apart else None


def _in_fields(kind: Any, message: Mapping[str, Body]) -> bool:
    """Whether the parts are the fields of a message. Raises InputError if only some of them are."""
    in_fields = dataclasses.is_dataclass(kind) and kind not in {Photo, Text}
    fields = plain.field_types(kind) if in_fields else {}
    named = message.keys() & fields.keys()
    unknown = [name for name in message if name not in fields]
    # A part that is called as a field is may also be a parameter beside the whole message.
    if not named or any(name in BODY_NAMES for name in ([*named] if len(message) == 1 else unknown)):
        return False
    if unknown:
        known = ", ".join(fields)
        raise InputError(
            f"The message has no {_shown(unknown)}: its parts are {known}; a parameter is called {PARAMETER}NAME."
        )
    return True


def _body_among(kind: Any, message: Mapping[str, Body]) -> str | None:
    """The part that is the whole message; None if there is no part."""
    for name in (*BODY_NAMES, {Photo: "image", Text: "text"}.get(kind)):
        if name in message:
            return name
    candidates = [name for name, part in message.items() if part.content_type or len(message) == 1]
    if message and len(candidates) != 1:
        what = f"Which of {_shown(message)} is the message? Call that part body"
        raise InputError(f"{what}, and send {codec.describe(kind)}.")
    return candidates[0] if candidates else None


def _field(kind: Any, part: Body, max_pixels: int) -> Any:
    """A part as the value of a field. Raises InputError, WrongDataError."""
    sent_as, charset = media.media_of(part.content_type), media.charset_of(part.content_type)
    if kind in {Photo, bytes, Any}:
        return codec.decode(kind, part.content, part.content_type, max_pixels=max_pixels)
    if media.is_json(sent_as):
        return codec.decode(kind, part.content, part.content_type)
    text = media.characters(part.content, charset)
    if kind is Text:
        return Text(text)
    try:
        return plain.build(kind, text)
    except plain.WrongDataError:
        try:
            data = strict_json.parse(text)
        except ValueError as error:
            if text.lstrip().startswith(("{", "[")):
                raise InputError(f"it is not valid JSON: {error}.") from None
        else:
            return plain.build(kind, data)
        raise


def _shown(names: Any) -> str:
    return ", ".join(name[:40] for name in list(names)[:10])
