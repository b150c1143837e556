"""Whether a server answers the same body alike each time, and how many objects its answers have."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

_CLOSE = 1e-3
"""How far numbers may differ: the batch size changes the order in which floating-point numbers are added up."""
_KNOWN = 64
"""How many different answers to one body are kept, so that each is read as JSON only once."""


class Verdict(NamedTuple):
    objects: int
    same: bool
    """Whether it says the same as the first answer to this body."""


class Answers:
    """Compares answers with the first answer to the same body.

    `at_end`: the answer is the end of the content; a protocol's framing precedes it.
    """

    def __init__(self, bodies: int, *, at_end: bool = False) -> None:
        self._read = _read_end if at_end else _read
        self._first: list[tuple[bytes, Any, Verdict] | None] = [None] * bodies
        """The first answer to each body: its bytes, its data, and its verdict."""
        self._others: list[dict[bytes, Verdict]] = [{} for _ in range(bodies)]

    def judge(self, body: int, content: bytes) -> Verdict:
        """The verdict on an answer to the body with this number."""
        first = self._first[body]
        if first is None:
            read = self._read(content)
            verdict = Verdict(_objects(read), same=True)
            self._first[body] = (content, read, verdict)
            return verdict
        if content == first[0]:
            return first[2]
        others = self._others[body]
        known = others.get(content)
        if known is None:
            read = self._read(content)
            known = Verdict(_objects(read), alike(read, first[1]))
            if len(others) < _KNOWN:
                others[content] = known
        return known

    def objects(self) -> list[int | None]:
        """The number of objects in the first answer to each body; None for a body without an answer."""
        return [first and first[2].objects for first in self._first]


def alike(one: Any, other: Any) -> bool:
    """Whether two answers say the same: floating-point numbers may differ by a thousandth."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    if numbers and (isinstance(one, float) or isinstance(other, float)):
        return math.isclose(one, other, rel_tol=_CLOSE, abs_tol=_CLOSE)
    return bool(one == other)


def _read(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content


def _read_end(content: bytes) -> Any:
    """The JSON object at the end of the content, if there is one; the framing before it may contain braces."""
    start = content.find(b"{")
    while start >= 0:
        answer = _read(content[start:])
        if isinstance(answer, dict):
            return answer
        start = content.find(b"{", start + 1)
    return content


def _objects(answer: Any) -> int:
    objects = answer.get("objects") if isinstance(answer, dict) else None
    if isinstance(objects, list):
        return len(objects)
    return objects if isinstance(objects, int) else 0
