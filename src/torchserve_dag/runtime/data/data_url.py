"""A photo in a chat, which comes as a data URL, to its pixels."""

from __future__ import annotations

import base64
import binascii

from torchserve_dag.runtime.data import photos
from torchserve_dag.runtime.messages import Chat, ImageUrl, InputError, Photo


def photo_urls(chat: Chat) -> list[ImageUrl]:
    """The photos of a chat, in order, not decoded."""
    parts = (part for message in chat.messages if isinstance(message.content, list) for part in message.content)
    return [part.image_url for part in parts if part.image_url]


def decode_photo(image: ImageUrl, max_pixels: int = photos.MAX_PIXELS) -> Photo:
    """The photo in a data URL. Raises InputError, as for a photo that is sent as a body."""
    head, _, data = image.url.partition(",")
    if not head.endswith(";base64"):
        raise InputError("messages: a photo's URL is data:image/jpeg;base64,… with the photo in base64.")
    try:
        body = base64.b64decode(data, validate=True)
    except binascii.Error:
        raise InputError("messages: a photo's base64 is damaged; encode the file again.") from None
    return photos.decode(body, max_pixels)
