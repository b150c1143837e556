"""Whether a value of one type may be passed where another type is declared: the rule for every edge."""

from __future__ import annotations

import typing
from typing import Any, Literal

from torchserve_dag.runtime.data.plain import is_union


def fits(have: Any, want: Any) -> bool:
    """Whether every value of type `have` is a `want`. Code only reads lists and dicts, so they are covariant."""
    if Any in {have, want} or have == want:
        return True
    if is_union(have):
        return all(fits(part, want) for part in typing.get_args(have))
    if is_union(want):
        return any(fits(have, part) for part in typing.get_args(want))
    if typing.get_origin(have) is Literal:
        values = typing.get_args(have)
        if typing.get_origin(want) is Literal:
            return set(values) <= set(typing.get_args(want))
        return all(fits(type(value), want) for value in values)
    return _class_fits(have, want)


def _class_fits(have: Any, want: Any) -> bool:
    have_origin, want_origin = typing.get_origin(have) or have, typing.get_origin(want) or want
    if have_origin is int and want_origin is float:
        return True
    if not (isinstance(have_origin, type) and isinstance(want_origin, type) and issubclass(have_origin, want_origin)):
        return False
    parts, wanted = typing.get_args(have), typing.get_args(want)
    if issubclass(have_origin, str | bytes) and wanted:
        return fits(str if issubclass(have_origin, str) else int, wanted[0])
    if have_origin is tuple and parts and wanted:
        fixed = parts[-1] is not ...
        if want_origin is tuple and wanted[-1] is not ...:
            return fixed and len(parts) == len(wanted) and all(map(fits, parts, wanted))
        return all(fits(part, wanted[0]) for part in parts if part is not ...)
    return all(map(fits, parts, wanted))


def union(kinds: list[Any]) -> Any:
    """The type of a value that has one of these types."""
    result = kinds[0]
    for kind in kinds[1:]:
        if Any in {kind, result}:
            result = Any
        elif not fits(kind, result):
            result = kind if fits(result, kind) else result | kind
    return result


def includes(kind: Any, part: Any) -> bool:
    """Whether `part` is `kind`, or a member of the union `kind`. Any includes nothing here."""
    return kind == part or (is_union(kind) and part in typing.get_args(kind))


def without(kind: Any, part: Any) -> Any:
    """`kind` without `part`: `Photo | Skipped` without `Skipped` is `Photo`."""
    if not is_union(kind):
        return kind
    left = [p for p in typing.get_args(kind) if p is not part]
    result = left[0]
    for p in left[1:]:
        result = result | p
    return result
