"""The messages: every value that crosses an edge of a workflow or a socket.

Each message is an immutable dataclass. A project defines its own beside its functions in `workflows/NAME.py`: any
dataclass of plain fields is a message, which `codec.py` can write and read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus

from PIL import Image


class InputError(Exception):
    """An item cannot be served, for a reason that its sender can mend.

    Raise it in any stage of a handler or in a function. The item gets `status` (HTTP, 4xx) and the
    message, one sentence for the client; the other items of the batch are not affected.
    """

    type = "InputError"
    """The failure's short name for programs."""

    def __init__(self, message: str, status: int = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.message = message
        self.status = int(status)


class OverloadedError(InputError):
    """An item cannot be served now, and may be sent again: 503."""

    type = "Overloaded"

    def __init__(self, message: str) -> None:
        super().__init__(message, HTTPStatus.SERVICE_UNAVAILABLE)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request or an item has no answer: a value that takes the place of the answer."""

    status: int
    """The HTTP status: 4xx if the sender can mend the failure, 5xx if the server's owner can."""
    message: str
    """One sentence: what, where, what to do."""
    type: str = "InputError"
    """A short name for programs."""
    node: str | None = None
    """The workflow's node that failed."""
    fault: str = field(default="", compare=False, repr=False)
    """What the log calls the exception behind it: the client is then told how its server's owner finds it there."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", int(self.status))  # an HTTPStatus would print its name


@dataclass(frozen=True, slots=True)
class Skipped:
    """The result of a node, or of an item, that did not run because its `when` was false."""

    by: str
    """The node whose `when` was false."""


@dataclass(frozen=True, slots=True)
class Photo:
    """A decoded photo: 8-bit RGB, upright (EXIF rotation applied)."""

    image: Image.Image
    """The pixels, as Pillow's image."""
    file: bytes | None = field(default=None, init=False, repr=False, compare=False)
    """The image file that the client sent, where it has these very pixels. A crop has none, nor a photo that had to be
    turned or converted. TorchServe handlers get it, who read the client's files themselves."""

    @classmethod
    def of_file(cls, image: Image.Image, file: bytes) -> Photo:
        """A photo whose pixels are those of an image file."""
        photo = cls(image)
        object.__setattr__(photo, "file", file)  # not of __init__, so that dataclasses.replace leaves it out
        return photo

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height

    def crop(self, box: Box) -> Photo:
        """The part inside `box`, clipped to the photo and at least one pixel wide and high."""
        left = min(max(int(box.left), 0), self.width - 1)
        top = min(max(int(box.top), 0), self.height - 1)
        right = min(max(round(box.right), left + 1), self.width)
        bottom = min(max(round(box.bottom), top + 1), self.height)
        return Photo(self.image.crop((left, top, right, bottom)))


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels of the upright photo. The origin is the photo's top left corner."""

    left: float
    """Distance of the left side from the photo's left side."""
    top: float
    """Distance of the upper side from the photo's upper side."""
    right: float
    """Distance of the right side from the photo's left side."""
    bottom: float
    """Distance of the lower side from the photo's upper side."""


@dataclass(frozen=True, slots=True)
class DetectedObject:
    """An object in a photo."""

    label: str
    """The object's class."""
    score: float
    """The detector's confidence, 0 to 1."""
    box: Box
    """Where the object is."""


@dataclass(frozen=True, slots=True)
class Objects:
    """A detector's answer. An empty list is an ordinary answer."""

    width: int
    """The photo's width in pixels."""
    height: int
    """The photo's height in pixels."""
    objects: list[DetectedObject] = field(default_factory=list)
    """The detected objects, highest score first."""


@dataclass(frozen=True, slots=True)
class Label:
    """A class and its probability."""

    name: str
    """The class."""
    score: float
    """The classifier's confidence, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Labels:
    """A classifier's answer."""

    labels: list[Label]
    """The most probable classes, highest score first; never empty."""

    @property
    def best(self) -> Label:
        return self.labels[0]


@dataclass(frozen=True, slots=True)
class Text:
    """A text."""

    text: str
    """The characters."""
