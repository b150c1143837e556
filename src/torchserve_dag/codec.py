"""Bytes to messages and back: the one place where a request's body is decoded and an answer encoded."""

from __future__ import annotations

import dataclasses
import io
import json
import warnings
from http import HTTPStatus
from typing import Any, TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError

from torchserve_dag import plain
from torchserve_dag.messages import Failure, InputError, Photo, Text

T = TypeVar("T")

MAX_PIXELS = 50_000_000
"""A photo with more is refused before it is decoded: 150 MB as RGB."""

PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ANY_CONTENT = {"", "application/octet-stream", "binary/octet-stream"}


def decode(kind: type[T], body: bytes, content_type: str | None = None) -> T:
    """A request's body as a `kind`. Raises InputError.

    `content_type` is what the client declared; nothing or `application/octet-stream` means "look".
    """
    if not body:
        raise InputError(f"The body is empty; send {describe(kind)}.")
    media = (content_type or "").partition(";")[0].strip().lower()
    value: Any
    if kind is Photo:
        _expect(media, "image/", kind)
        value = _photo(body)
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


def encode(message: Any) -> tuple[bytes, str]:
    """An answer as its body and content type.

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


def failure_fields(failure: Failure, request_id: str | None = None) -> dict[str, Any]:
    """A failure as TorchServe writes its own: `code`, `type`, `message`; `node` and `request_id` where known."""
    fields = {"code": failure.status, "type": failure.type, "message": failure.message}
    return fields | {k: v for k, v in (("node", failure.node), ("request_id", request_id)) if v is not None}


def failure_in(body: bytes) -> Failure | None:
    """The failure that a body holds, if it is one.

    Over gRPC TorchServe drops the status that a worker sets and delivers the body as an ordinary
    answer, so a client has to look; no message of ours begins with a `code`.
    """
    if not body.lstrip()[:7].replace(b" ", b"").startswith(b'{"code"'):
        return None
    try:
        fields = json.loads(body)
    except ValueError:
        return None
    if not {"code", "type", "message"} <= fields.keys() or not isinstance(fields["code"], int):
        return None
    return Failure(fields["code"], str(fields["message"]), str(fields["type"]), fields.get("node"))


def describe(kind: Any) -> str:
    """What a body of this kind is, for a person."""
    if kind is Photo:
        return f"a photo ({', '.join(PHOTO_FORMATS)})"
    if kind is Text:
        return 'text (text/plain, or JSON {"text": "…"})'
    if kind in {bytes, Any}:
        return "bytes"
    if dataclasses.is_dataclass(kind):
        return f"JSON with the keys {', '.join(plain.field_types(kind))}"  # type: ignore[arg-type]
    return f"JSON ({plain.name_of(kind)})"


def _expect(media: str, wanted: str, kind: type) -> None:
    # curl and many clients call every body a form; TorchServe hands a form's parts over one by one,
    # so what arrives here under that name is a part without a type of its own.
    if media in _ANY_CONTENT or media.startswith(wanted):
        return
    raise InputError(
        f"The content type {media} is not served here; send {describe(kind)}.", HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    )


def _photo(body: bytes) -> Photo:
    """The first frame of an image, upright, as 8-bit RGB; transparent parts become white."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of a bomb at 90 million pixels; the limit here is lower and firm.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(body), formats=PHOTO_FORMATS)
    except Image.DecompressionBombError:
        raise InputError(
            f"The photo has too many pixels; the limit is {MAX_PIXELS:,}.", HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        ) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise InputError(
            f"The body is not a photo; send {describe(Photo)}.", HTTPStatus.UNSUPPORTED_MEDIA_TYPE
        ) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"The photo is {width:,} x {height:,} = {width * height:,} pixels; the limit is {MAX_PIXELS:,}.",
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        )
    try:
        image.seek(0)
        image.load()
        return Photo(_rgb(ImageOps.exif_transpose(image)))
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        raise InputError(f"The photo is damaged and cannot be decoded: {error}.") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in {"I", "I;16", "I;16B", "I;16L", "F"}:  # 16 bits a pixel: Pillow's own conversion clips at 255
        scaled = image.convert("F") if image.mode == "F" else image.convert("I")
        return scaled.point(lambda value: value * (1 / 257)).convert("L").convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _text(body: bytes, media: str) -> Text:
    if media in {"application/json"}:
        return _plain(Text, body)
    if media not in _ANY_CONTENT and not media.startswith("text/"):
        _expect(media, "text/", Text)
    try:
        return Text(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"The text is not UTF-8 (byte {error.start}); send {describe(Text)}.") from None


def _anything(body: bytes, media: str) -> Any:
    """What TorchServe hands a handler: JSON decoded where it is declared, else the bytes."""
    if media == "application/json":
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise InputError(f"The body is not valid JSON: {error}.") from None
    return bytes(body)


def _plain(kind: type[T], body: bytes) -> T:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"The body is not valid JSON: {error}; send {describe(kind)}.") from None
    try:
        return plain.build(kind, data)
    except plain.WrongDataError as error:
        raise InputError(f"The JSON does not fit: {error}.", HTTPStatus.UNPROCESSABLE_ENTITY) from None
