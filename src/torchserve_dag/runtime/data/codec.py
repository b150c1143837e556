"""Bytes to messages and back: every request's body is decoded here, and every answer encoded."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
from contextlib import suppress
from http import HTTPStatus
from typing import Any, TypeVar

from torchserve_dag.runtime.data import media, photos, plain, strict_json
from torchserve_dag.runtime.messages import Failure, InputError, Photo, Text

T = TypeVar("T")

FAILURE_TRAILER = "x-failure"
"""gRPC's trailing metadata with a failure in JSON, where the call's status says that the call failed."""
_FAILURE = re.compile(rb'\s*\{\s*"code"\s*:')
_FAILURE_KEYS = {"code", "type", "message", "node", "request_id"}


def decode(kind: type[T], body: bytes, content_type: str | None = None, *, max_pixels: int = photos.MAX_PIXELS) -> T:
    """A request's body as a `kind`. Raises InputError.

    `content_type` is the client's. Without it, or with one that says nothing (`media.SAYS_NOTHING`), the type is
    detected from the bytes.
    `max_pixels`: of a photo.
    """
    if not body:
        raise InputError(f"The body is empty; send {describe(kind)}.")
    sent_as, charset = media.media_of(content_type), media.charset_of(content_type)
    value: Any
    if kind is Photo:
        _expect(sent_as, sent_as.startswith("image/"), kind)
        value = photos.decode(body, max_pixels)
    elif kind is Text:
        value = _text(body, sent_as, charset)
    elif kind is bytes:
        value = bytes(body)
    elif kind is Any:  # as TorchServe passes it to a handler: decoded if it is declared as JSON, else the bytes
        value = _json(body, charset, kind) if media.is_json(sent_as) else bytes(body)
    else:
        _expect(sent_as, media.is_json(sent_as), kind)
        value = _plain(kind, body, charset)
    return value  # type: ignore[no-any-return]


def decode_answer(kind: type[T], body: bytes) -> T:
    """The answer of a foreign model as a `kind`. Raises InputError.

    The body has no content type. So for Any the result is the data of its JSON, or else its bytes; for a text, the text
    in JSON, or else the body itself.
    """
    if kind is bytes:
        return body  # type: ignore[return-value]
    if kind in {Any, Text, str}:
        try:
            return decode(kind, body, "application/json")
        except InputError:
            if kind is Any:
                return body  # type: ignore[return-value]
    if kind is str:
        return decode(Text, body).text if body else ""  # type: ignore[return-value]
    return decode(kind, body)


def encode(message: Any) -> tuple[bytes, str]:
    """Encode an answer as a body with its content type.

    A photo is written as PNG, bytes as they are, everything else as JSON. Raises UnwritableError.
    """
    if isinstance(message, Photo):
        buffer = io.BytesIO()
        message.image.save(buffer, "PNG")
        return buffer.getvalue(), "image/png"
    if isinstance(message, bytes | bytearray):
        return bytes(message), "application/octet-stream"
    if isinstance(message, Failure):
        return json.dumps(failure_fields(message)).encode(), "application/json"
    return plain.to_json(message), "application/json"


def bmp(photo: Photo) -> bytes:
    """A photo as a file that is quick to write and to read: a PNG takes as long as a small model."""
    buffer = io.BytesIO()
    photo.image.save(buffer, "BMP")
    return buffer.getvalue()


def writes(kind: Any) -> bool:
    """Whether `encode` can write every value of a type. Photos and bytes can be whole answers only."""
    return kind in {Photo, bytes} or plain.fits_json(kind)


def failure_fields(failure: Failure, request_id: str | None = None) -> dict[str, Any]:
    """A failure as JSON fields: TorchServe's `code`, `type`, `message`; `node` and `request_id` if known."""
    message = failure.message
    if failure.fault and request_id:  # quoted, for it is copied into a shell, and the client may have chosen it
        message = f"{message.rstrip('.')}: torchserve-dag logs --request {shlex.quote(request_id)} says why."
    fields = {"code": failure.status, "type": failure.type, "message": message}
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


def reads(kind: Any) -> bool:
    """Whether a client can send a message of this type: as a body, or field by field as the parts of a form."""
    if kind in {Photo, Text, bytes} or plain.fits_json(kind):
        return True
    fields = plain.field_types(kind).values() if dataclasses.is_dataclass(kind) else ()  # type: ignore[arg-type]
    return bool(fields) and all(field in {Photo, bytes} or plain.fits_json(field) for field in map(plain.given, fields))


def describe(kind: Any) -> str:
    """What to send as a body of this type, in words."""
    if kind is Photo:
        return photos.DESCRIBED
    if kind is Text:
        return 'text (text/plain, or JSON {"text": "…"})'
    if kind in {bytes, Any}:
        return "bytes"
    if dataclasses.is_dataclass(kind):
        names = ", ".join(plain.field_types(kind))  # type: ignore[arg-type]
        return f"JSON with the keys {names}" if plain.fits_json(kind) else f"a form with the parts {names}"
    return f"JSON ({plain.name_of(kind)})"


def content_type_of(kind: Any) -> str:
    """The content type under which a client may send a body of this type."""
    usual = {Photo: "image/jpeg", Text: "text/plain", bytes: "application/octet-stream"}
    return usual.get(kind) or ("application/json" if plain.fits_json(kind) else "multipart/form-data")


def _expect(sent_as: str, fits: bool, kind: type) -> None:  # noqa: FBT001
    if not (fits or sent_as in media.SAYS_NOTHING):
        raise InputError(
            f"The content type {sent_as} is not accepted here; send {describe(kind)}.",
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        )


def _text(body: bytes, sent_as: str, charset: str | None) -> Text:
    if media.is_json(sent_as):
        return _plain(Text, body, charset)
    _expect(sent_as, sent_as.startswith("text/"), Text)
    text = media.characters(body, charset)
    # `curl -d` declares JSON as a form, too. Where the content type is another, a text may look like JSON.
    if sent_as == media.FORM and text.lstrip().startswith("{"):
        with suppress(ValueError, plain.WrongDataError):
            return plain.build(Text, strict_json.parse(text))
    return Text(text)


def _plain(kind: type[T], body: bytes, charset: str | None) -> T:
    data = _json(body, charset, kind)
    try:
        return plain.build(kind, data)
    except plain.WrongDataError as error:
        instead = "" if plain.fits_json(kind) else f"; send {describe(kind)}"
        raise InputError(f"The JSON does not fit: {error}{instead}.", HTTPStatus.UNPROCESSABLE_ENTITY) from None


def _json(body: bytes, charset: str | None, kind: type) -> Any:
    text = media.characters(body, charset)
    try:
        return strict_json.parse(text)
    except ValueError as error:
        instead = "" if kind is Any else f"; send {describe(kind)}"
        raise InputError(f"The body is not valid JSON: {error}{instead}.") from None
