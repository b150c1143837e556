"""Splits a document's sections into passages, which are embedded and found one by one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torchserve_dag.retrieval.sections import Section

MOST_CHARACTERS = 800
"""Of a passage: most have then no more tokens than an embedding model takes. Those that have are halved."""
MAX_HEADING = 200
_ENDS = (
    re.compile(r"\n[ \t\r]*\n"),
    re.compile(r"\n"),
    re.compile(r"(?:(?<=[.!?;:\u061f\u06d4])|(?<=[.!?][\"')\]]))\s|(?<=[\u3002\uff01\uff1f])"),
    re.compile(r"\s"),
)
"""Where a passage may end, the best places first: paragraphs, lines, sentences, words."""
_JOINERS = "\u200c\u200d\ufe0e\ufe0f"


@dataclass(frozen=True, slots=True)
class Piece:
    """A passage of a document, before it has a vector."""

    text: str
    heading: str
    begin: int
    """In the document's text, in characters; `end` likewise."""
    end: int
    line: int
    page: int | None = None

    @property
    def searched(self) -> str:
        """What is embedded and searched for words: the headings say what the words are about."""
        return f"{self.heading}\n{self.text}" if self.heading else self.text


def split(sections: Iterable[Section], most: int = MOST_CHARACTERS) -> Iterator[Piece]:
    """The passages of a document's sections, in order; each has at most so many characters."""
    for section in sections:
        for begin, end in _ranges(section.text, 0, len(section.text), most):
            yield Piece(
                section.text[begin:end],
                section.heading[:MAX_HEADING],
                section.begin + begin,
                section.begin + end,
                section.line_at(begin),
                section.page,
            )


def halved(piece: Piece) -> list[Piece]:
    """A passage as two or more shorter ones; none where it is a single character."""
    if len(piece.text) <= 1:
        return []
    return [
        replace(
            piece,
            text=piece.text[begin:end],
            begin=piece.begin + begin,
            end=piece.begin + end,
            line=piece.line + piece.text.count("\n", 0, begin),
        )
        for begin, end in _ranges(piece.text, 0, len(piece.text), (len(piece.text) + 1) // 2)
    ]


def _ranges(text: str, begin: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    """Stretches without the spaces around them, each of at most so many characters."""
    while begin < end:
        if text[begin].isspace():
            begin += 1
            continue
        cut = end if end - begin <= most else _cut(text, begin, begin + most)
        stripped = len(text[begin:cut].rstrip())
        yield begin, begin + stripped
        begin = cut


def _cut(text: str, begin: int, limit: int) -> int:
    """The best place to end a passage that must end before `limit`: not in its first third, if there is another."""
    least = begin + (limit - begin) // 3
    for ends in _ENDS:
        places = [found.end() for found in ends.finditer(text, least, limit)]
        if places:
            return places[-1]
    cut = limit
    while cut > least and (unicodedata.combining(text[cut]) or text[cut] in _JOINERS or text[cut - 1] in _JOINERS):
        cut -= 1  # what is one character to a reader stays whole
    return cut if cut > least else limit
