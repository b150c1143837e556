"""What a reader makes of a document: its text, in sections with their headings and places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SEPARATOR = " > "
"""Between the headings above a passage."""


class Heading(NamedTuple):
    level: int
    """1 for a title."""
    text: str


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of a document below one heading, or a page."""

    text: str
    heading: str
    """The headings above it, outermost first."""
    begin: int
    """Where it begins in the document's text, in characters."""
    line: int
    """The line that it begins in, from 1; of a PDF, of the page."""
    page: int | None = None
    """Of a PDF: the page, from 1."""
    lines: tuple[int, ...] = ()
    """Of HTML: the line of the file for each line of the text."""

    def line_at(self, place: int) -> int:
        """The line of a character of the text."""
        down = self.text.count("\n", 0, place)
        return self.lines[min(down, len(self.lines) - 1)] if self.lines else self.line + down


class Headings:
    """The headings above a place, as a document is read from its beginning."""

    def __init__(self) -> None:
        self._above: list[Heading] = []

    def add(self, heading: Heading) -> None:
        self._above = [one for one in self._above if one.level < heading.level] + [heading]

    def __str__(self) -> str:
        return SEPARATOR.join(one.text for one in self._above if one.text)
