"""What a node depends on, directly and through other nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def upstream(names: Iterable[str], needs: Mapping[str, Iterable[str]]) -> set[str]:
    """`names` and all names that they depend on, directly or not; `needs`: name → the names that it depends on."""
    reached: set[str] = set()
    to_visit = list(names)
    while to_visit:
        name = to_visit.pop()
        if name in needs and name not in reached:
            reached.add(name)
            to_visit += needs[name]
    return reached
