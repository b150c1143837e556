"""The sections of a Markdown document, by its headings: both kinds of CommonMark, outside of fences."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torchserve_dag.retrieval.sections import Heading, Headings, Section

_HASHES = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_MATTER = ("---\n", "---\r\n")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_NO_TITLE = re.compile(r"[ \t]*$| {4}|\t| {0,3}(?:[-*+>|]|[0-9]+[.)]|#{1,6}[ \t])")
"""A line that cannot be a heading, whatever stands under it."""
_MARKUP = re.compile(r"!?\[([^\]]*)\]\([^)]*\)|[*`]+|<[^>]*>")


def sections(text: str) -> list[Section]:
    """Each heading with what is below it, its own line included."""
    headings, found, begin, first = Headings(), list[Section](), 0, 1
    heading = ""
    for place, line, new in _headings(text):
        if text[begin:place].strip():
            found.append(Section(text[begin:place], heading, begin, first))
        headings.add(new)
        heading, begin, first = str(headings), place, line
    if text[begin:].strip():
        found.append(Section(text[begin:], heading, begin, first))
    return found


def _headings(text: str) -> Iterator[tuple[int, int, Heading]]:
    """Where each heading begins, its line, and the heading."""
    place, before, before_at = 0, "", 0
    fence = ""
    matter = text.startswith(_MATTER)
    for number, whole in enumerate(_lines(text), 1):
        line = whole.rstrip("\r\n")
        if matter:  # data about the document, before it begins
            matter = number == 1 or line != "---"
            line = ""
        elif mark := _FENCE.match(line):
            fence = _after(fence, mark[1], line)
            line = ""
        elif fence:
            line = ""
        elif hashes := _HASHES.match(line):
            yield place, number, Heading(len(hashes[1]), _plain(hashes[2]))
        elif before and (under := _UNDERLINE.match(line)) and not _NO_TITLE.match(before):
            yield before_at, number - 1, Heading(1 if under[1][0] == "=" else 2, _plain(before))
        before, before_at = line, place
        place += len(whole)


def _after(fence: str, mark: str, line: str) -> str:
    """The fence that is open after a line with a mark: a fence ends with one of its kind that is no shorter."""
    if not fence:
        return mark
    return "" if mark[0] == fence[0] and len(mark) >= len(fence) and not line.strip().strip(mark[0]) else fence


def _lines(text: str) -> list[str]:
    """The lines, with their ends: str.splitlines would end them at rarer characters too."""
    return re.findall(r"[^\n]*\n|[^\n]+$", text)


def _plain(text: str) -> str:
    """A heading without its markup."""
    return " ".join(_MARKUP.sub(lambda found: found[1] or "", text).split())
