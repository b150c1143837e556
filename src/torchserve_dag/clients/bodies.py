"""A message as a request's body, and an answer's body as a message, for REST and gRPC alike."""

from __future__ import annotations

import json
import mimetypes
from pathlib import Path
from typing import Any, TypeVar

from torchserve_dag.clients.errors import unexpected_answer
from torchserve_dag.runtime.data import codec, plain
from torchserve_dag.runtime.data.parts import Body, Parts, fields_apart
from torchserve_dag.runtime.messages import InputError, Photo, Text

T = TypeVar("T")

UNKNOWN = "application/octet-stream"
"""The content type that makes a server detect the type from the bytes."""

PLAIN_TEXT = "text/plain; charset=utf-8"

_MAGIC = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
)


def body_of(message: Any) -> Body | Parts:
    """A message as a body. Bytes and files are sent as they are: prefer a photo's file to a decoded Photo, which
    has to be encoded as PNG: that takes time, and is larger.

    A message with a photo or bytes in a field, or a mapping with a path, is sent in parts: one for each field that is
    not None. Over gRPC only that of JSON is sent, as an entry of the map: TorchServe has no field for it.

    Raises OSError if a file cannot be read, TypeError for a str, which may be a path or a text, and for a message that
    cannot be sent.
    """
    if isinstance(message, str):
        raise TypeError(f'"{message[:40]}" may be a path or a text; write Path("…") or Text("…")')
    if isinstance(message, Path):
        content = message.read_bytes()
        return Body(content, _look(content) or mimetypes.guess_type(message.name)[0] or UNKNOWN)
    if isinstance(message, bytes | bytearray | memoryview):
        content = bytes(message)
        return Body(content, _look(content) or UNKNOWN)
    if isinstance(message, Text):
        # Not as JSON: a stock TorchServe's handlers know no content type over gRPC.
        return Body(message.text.encode(), PLAIN_TEXT)
    fields = fields_apart(message)
    if fields is not None:
        return Parts({name: _part(value) for name, value in fields.items()})
    return Body(*codec.encode(message))


def _part(value: Any) -> Body:
    part = Body(value.encode(), PLAIN_TEXT) if isinstance(value, str) else body_of(value)
    if isinstance(part, Parts):
        raise TypeError("a field of a message in parts cannot have parts itself")
    return part


def answer_as(kind: type[T] | None, body: bytes) -> T | Any:
    """An answer's body as a `kind`; with None, the data of its JSON, or the bytes if it is not JSON.

    Raises UnexpectedAnswer if the body is something else.
    """
    if kind is None:
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            return body
    if kind is bytes:
        return body
    try:
        if kind is Text:
            return _text(body)
        if kind is Photo:
            return codec.decode(kind, body)
        return plain.build(kind, json.loads(body))
    except InputError as error:
        raise unexpected_answer(f"The answer is not a {plain.name_of(kind)}. {error.message}") from None
    except ValueError as error:
        raise unexpected_answer(f"The answer is not a {plain.name_of(kind)}, and not even JSON: {error}.") from None
    except plain.WrongDataError as error:
        raise unexpected_answer(f"The answer is not a {plain.name_of(kind)}: {error}.") from None


def _look(content: bytes) -> str | None:
    """The content type, detected from the first bytes."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    return next((media for magic, media in _MAGIC if content.startswith(magic)), None)


def _text(body: bytes) -> Text:
    """The text in a body: the `text` of its JSON, as handlers of this package answer, else the body itself."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, dict) and data.keys() == {"text"}:
        return plain.build(Text, data)
    return codec.decode(Text, body)
