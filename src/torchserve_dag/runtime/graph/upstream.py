"""What a node depends on, directly and through other nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def upstream(
    names: Iterable[str], needs: Mapping[str, Iterable[str]], stops: Mapping[str, Iterable[str]] | None = None
) -> set[str]:
    """`names` and all names that they depend on, directly or not; `needs`: name → the names that it depends on.

    With `stops`, name → the names that it may end early, a name depends on those that may end it, too.
    """
    stopped_by: dict[str, list[str]] = {}
    for name, targets in (stops or {}).items():
        for target in targets:
            stopped_by.setdefault(target, []).append(name)
    reached: set[str] = set()
    to_visit = list(names)
    while to_visit:
        name = to_visit.pop()
        if name in needs and name not in reached:
            reached.add(name)
            to_visit += [*needs[name], *stopped_by.get(name, ())]
    return reached
