"""Whether a value of one type may go where another is wanted: the rule for every edge."""

from __future__ import annotations

import typing
from typing import Any

from torchserve_dag.plain import is_union


def fits(have: Any, want: Any) -> bool:
    """Whether every value of type `have` is a `want`. Lists and dicts are read only, so covariant."""
    if Any in {have, want} or have == want:
        return True
    if is_union(have):
        return all(fits(part, want) for part in typing.get_args(have))
    if is_union(want):
        return any(fits(have, part) for part in typing.get_args(want))
    have_origin, want_origin = typing.get_origin(have) or have, typing.get_origin(want) or want
    if have_origin is int and want_origin is float:
        return True
    if not (isinstance(have_origin, type) and isinstance(want_origin, type) and issubclass(have_origin, want_origin)):
        return False
    pairs = zip(typing.get_args(have), typing.get_args(want), strict=False)
    return all(fits(a, b) for a, b in pairs)


def union(kinds: list[Any]) -> Any:
    """The type of a value that is one of these."""
    result = kinds[0]
    for kind in kinds[1:]:
        if Any in {kind, result}:
            result = Any
        elif not fits(kind, result):
            result = kind if fits(result, kind) else result | kind
    return result


def includes(kind: Any, part: Any) -> bool:
    """Whether a value of type `kind` is said to be possibly a `part`; "anything" says nothing."""
    return kind == part or (is_union(kind) and part in typing.get_args(kind))


def without(kind: Any, part: Any) -> Any:
    """`kind` less `part`: `Photo | Skipped` without `Skipped` is `Photo`."""
    if not is_union(kind):
        return kind
    left = [p for p in typing.get_args(kind) if p is not part]
    result = left[0]
    for p in left[1:]:
        result = result | p
    return result
