"""Bytes to messages and back: every request's body is decoded here, and every answer encoded."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from http import HTTPStatus
from typing import Any, TypeVar

from torchserve_dag.runtime.data import photos, plain
from torchserve_dag.runtime.messages import Failure, InputError, Photo, Text

T = TypeVar("T")

_FAILURE = re.compile(rb'\s*\{\s*"code"\s*:')
_FAILURE_KEYS = {"code", "type", "message", "node", "request_id"}
_ANY_CONTENT = {"", "application/octet-stream", "binary/octet-stream"}


def decode(kind: type[T], body: bytes, content_type: str | None = None, *, max_pixels: int = photos.MAX_PIXELS) -> T:
    """A request's body as a `kind`. Raises InputError.

    `content_type` is the client's. Without it, or with `application/octet-stream`, the type is detected from the bytes.
    `max_pixels`: of a photo.
    """
    if not body:
        raise InputError(f"The body is empty; send {describe(kind)}.")
    media = (content_type or "").partition(";")[0].strip().lower()
    value: Any
    if kind is Photo:
        _expect(media, "image/", kind)
        value = photos.decode(body, max_pixels)
    elif kind is Text:
        value = _text(body, media)
    elif kind is bytes:
        value = bytes(body)
    elif kind is Any:
        value = _anything(body, media)
    else:
        _expect(media, "application/json", kind)
        value = _plain(kind, body)
    return value  # type: ignore[no-any-return]


def decode_answer(kind: type[T], body: bytes) -> T:
    """The answer of a foreign model as a `kind`. Raises InputError.

    The body has no content type. So for Any the result is the data of its JSON, or else its bytes; for Text, the text
    in our own JSON, or else the body itself.
    """
    if kind is bytes:
        return body  # type: ignore[return-value]
    if kind is Any or kind is Text:
        try:
            return decode(kind, body, "application/json")
        except InputError:
            if kind is Any:
                return body  # type: ignore[return-value]
    return decode(kind, body)


def encode(message: Any) -> tuple[bytes, str]:
    """Encode an answer as a body with its content type.

    A photo is written as PNG, bytes as they are, everything else as JSON.
    """
    if isinstance(message, Photo):
        buffer = io.BytesIO()
        message.image.save(buffer, "PNG")
        return buffer.getvalue(), "image/png"
    if isinstance(message, bytes | bytearray):
        return bytes(message), "application/octet-stream"
    if isinstance(message, Failure):
        return json.dumps(failure_fields(message)).encode(), "application/json"
    return json.dumps(plain.flatten(message), ensure_ascii=False, allow_nan=False).encode(), "application/json"


def writes(kind: Any) -> bool:
    """Whether `encode` can write every value of a type. Photos and bytes can be whole answers only."""
    return kind in {Photo, bytes} or plain.fits_json(kind)


def failure_fields(failure: Failure, request_id: str | None = None) -> dict[str, Any]:
    """A failure as JSON fields: TorchServe's `code`, `type`, `message`; `node` and `request_id` if known."""
    fields = {"code": failure.status, "type": failure.type, "message": failure.message}
    return fields | {k: v for k, v in (("node", failure.node), ("request_id", request_id)) if v is not None}


def failure_in(body: bytes) -> Failure | None:
    """The failure that a body contains, or None.

    Over gRPC TorchServe drops the status that a worker sets and delivers the body as an ordinary
    answer. So a client has to look into the body, and no message of ours begins with a `code`.
    """
    if not _FAILURE.match(body):
        return None
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not {"code", "type", "message"} <= fields.keys() <= _FAILURE_KEYS:
        return None
    code, kind, message, node = fields["code"], fields["type"], fields["message"], fields.get("node")
    if type(code) is not int or code < HTTPStatus.BAD_REQUEST or not isinstance(kind, str):
        return None
    return Failure(code, str(message), kind, node)


def describe(kind: Any) -> str:
    """What to send as a body of this type, in words."""
    if kind is Photo:
        return photos.DESCRIBED
    if kind is Text:
        return 'text (text/plain, or JSON {"text": "…"})'
    if kind in {bytes, Any}:
        return "bytes"
    if dataclasses.is_dataclass(kind):
        return f"JSON with the keys {', '.join(plain.field_types(kind))}"  # type: ignore[arg-type]
    return f"JSON ({plain.name_of(kind)})"


def _expect(media: str, wanted: str, kind: type) -> None:
    # curl and many clients declare every body as a form. TorchServe passes a real form's parts on one by one, so this
    # content type here means that the body has none of its own.
    if media in _ANY_CONTENT or media.startswith(wanted):
        return
    raise InputError(
        f"The content type {media} is not accepted here; send {describe(kind)}.", HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    )


def _text(body: bytes, media: str) -> Text:
    if media == "application/json":
        return _plain(Text, body)
    if media not in _ANY_CONTENT and not media.startswith("text/"):
        _expect(media, "text/", Text)
    try:
        return Text(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"The text is not UTF-8 (byte {error.start}); send {describe(Text)}.") from None


def _anything(body: bytes, media: str) -> Any:
    """The body as TorchServe passes it to a handler: decoded if it is declared as JSON, else the bytes."""
    if media == "application/json":
        try:
            return _json(body)
        except (ValueError, RecursionError) as error:
            raise InputError(f"The body is not valid JSON: {error}.") from None
    return bytes(body)


def _plain(kind: type[T], body: bytes) -> T:
    try:
        data = _json(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"The body is not valid JSON: {error}; send {describe(kind)}.") from None
    try:
        return plain.build(kind, data)
    except plain.WrongDataError as error:
        raise InputError(f"The JSON does not fit: {error}.", HTTPStatus.UNPROCESSABLE_ENTITY) from None


def _json(body: bytes) -> Any:
    """Parse strict JSON. Python's own parser accepts NaN and lone surrogates, which no answer could contain."""
    data = json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant, parse_float=_finite)
    if b"\\u" in body:
        json.dumps(data, ensure_ascii=False).encode()
    return data


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
