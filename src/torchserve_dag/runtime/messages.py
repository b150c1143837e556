"""The messages: every value that crosses an edge of a workflow or a socket.

Each is an immutable dataclass. A project adds its own beside its functions in `workflows/NAME.py`;
any dataclass of plain fields is a message, and `codec.py` knows how to write and read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus

from PIL import Image


class InputError(Exception):
    """An item that cannot be served, for a reason its sender can mend.

    Raise it in any stage of a handler or in a function. The item gets `status` (HTTP, 4xx) and the
    message, one sentence for the client; its neighbours in the batch are not touched.
    """

    def __init__(self, message: str, status: int = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.message = message
        self.status = int(status)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request or an item got no answer: a value, which travels where the answer would have."""

    status: int
    """The HTTP status; 4xx is for the sender to mend, 5xx for the server's owner."""
    message: str
    """One sentence: what, where, what to do."""
    type: str = "InputError"
    """A short name for programs."""
    node: str | None = None
    """The workflow's node that failed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", int(self.status))  # an HTTPStatus prints otherwise


@dataclass(frozen=True, slots=True)
class Skipped:
    """The answer of a node or an item that its `when` left out."""

    by: str
    """The node whose `when` said no."""


@dataclass(frozen=True, slots=True)
class Photo:
    """A decoded photo: 8-bit RGB, upright (EXIF rotation applied)."""

    image: Image.Image

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
    """A rectangle in pixels of the upright photo; the origin is its top left corner."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True)
class DetectedObject:
    label: str
    score: float
    """0 to 1."""
    box: Box


@dataclass(frozen=True, slots=True)
class Objects:
    """What a detector found, best score first; finding nothing is an ordinary answer."""

    width: int
    """Of the photo, in pixels."""
    height: int
    objects: list[DetectedObject] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Label:
    name: str
    score: float
    """0 to 1."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What a classifier thinks, best score first, never empty."""

    labels: list[Label]

    @property
    def best(self) -> Label:
        return self.labels[0]


@dataclass(frozen=True, slots=True)
class Text:
    text: str
