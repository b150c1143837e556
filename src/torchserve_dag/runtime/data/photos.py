"""A photo's bytes to its pixels: `decode`, and the bound on the pixels that are decoded at one time."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from PIL import Image

from torchserve_dag.runtime.data.photo_formats import FORMATS, format_of
from torchserve_dag.runtime.messages import InputError, OverloadedError, Photo

MAX_PIXELS = 70_000_000
"""The limit where nothing else is said: the photos of phones with 64 megapixels are read. As RGB it is 280 MB."""

MOST_PIXELS = 178_956_970
"""Above it some of Pillow's readers refuse a photo whatever our limit is: twice its `Image.MAX_IMAGE_PIXELS`."""

PIXELS_AT_ONCE = 200_000_000
"""Pixels that are being decoded in a process at one time; a further photo waits. A pixel takes 4 to 12 bytes while its
photo is decoded, turned upright and converted to RGB; more, up to 24, where it counts twice (`Opened.weight`)."""

WAIT_S = 10.0
"""How long a photo waits until others are decoded. Then it is refused as too much load. It is less than half of a
request's time limit, after which a worker whose lane does nothing else would be taken for one that hangs."""

DESCRIBED = f"a photo ({', '.join(each.name for each in FORMATS)})"
"""What is read, in words."""


def decode(body: bytes, max_pixels: int = MAX_PIXELS) -> Photo:
    """The first picture of a file, upright, as 8-bit RGB; transparent parts become white, colour profiles are ignored.

    Raises InputError: 415 for what is no photo or a kind that is not read, 413 for too many pixels, 400 for a damaged
    photo; and OverloadedError.
    """
    kind = format_of(body)
    if kind is None:
        raise InputError(
            f"The body is not a photo that is read here; send {DESCRIBED}.", HTTPStatus.UNSUPPORTED_MEDIA_TYPE
        )
    try:
        opened = kind.open(body)
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise _too_large("more pixels than Pillow reads", max_pixels) from None
    except Exception as error:  # noqa: BLE001 (broken bytes make Pillow raise struct.error, TypeError and more)
        what = f"The photo is damaged, or a kind of {kind.name} that is not read here"
        message = f"{what}: {_sentence(error)}; send {DESCRIBED}."
        raise InputError(message, HTTPStatus.UNSUPPORTED_MEDIA_TYPE) from None
    (width, height), weight = opened.size, opened.weight
    if width * height > max_pixels:
        raise _too_large(f"{width:,} x {height:,} = {width * height:,} pixels", max_pixels)
    with _decoding.room(width * height * weight):
        try:
            image, same = opened.load()
            del opened  # with the pixels as they were before they were turned
            same = same and image.mode == "RGB" and "transparency" not in image.info
            rgb = _rgb(image)
            return Photo.of_file(rgb, body) if same else Photo(rgb)
        except MemoryError:
            raise OverloadedError("There is no memory for the photo's pixels; try again in some seconds.") from None
        except Exception as error:  # noqa: BLE001
            message = f"The photo is damaged and cannot be decoded: {_sentence(error)}."
            raise InputError(message) from None


def _too_large(size: str, max_pixels: int) -> InputError:
    message = f"The photo is {size}; the limit is {max_pixels:,}."
    return InputError(message, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)


def pixels_in(message: Any) -> int:
    """How many decoded pixels a request's message holds: it is a photo, or has photos as fields."""
    if isinstance(message, Photo):
        return message.width * message.height
    if dataclasses.is_dataclass(message):
        return sum(pixels_in(getattr(message, field.name)) for field in dataclasses.fields(message))
    return 0


class _Room:
    """A bound on the pixels that are being decoded. First come, first served; a photo alone always has room."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pixels = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def room(self, pixels: int) -> Iterator[None]:
        me = object()
        with self._changed:
            self._waiting.append(me)
            try:
                if not self._changed.wait_for(lambda: self._waiting[0] is me and self._fits(pixels), WAIT_S):
                    raise OverloadedError("Too many large photos are being decoded; try again in some seconds.")
                self._pixels += pixels
            finally:
                self._waiting.remove(me)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._pixels -= pixels
                self._changed.notify_all()

    def _fits(self, pixels: int) -> bool:
        return not self._pixels or self._pixels + pixels <= self._limit


_decoding = _Room(PIXELS_AT_ONCE)


def _rgb(image: Image.Image) -> Image.Image:
    """As RGB, without what else the file said: a handler that looks for an orientation would turn the photo again."""
    if image.mode == "La":  # Pillow converts premultiplied grey to nothing else
        image = image.convert("LA")
    if image.mode in {"RGBA", "LA", "PA", "RGBa"} or "transparency" in image.info:
        if image.mode != "RGBA":
            image = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(image, mask=image)
        return rgb
    # `convert` would copy what is RGB already: 200 MB of a photo with 50 megapixels.
    rgb = Image.Image()._new(image.im) if image.mode == "RGB" else image.convert("RGB")  # noqa: SLF001
    rgb.info = {}
    return rgb


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
