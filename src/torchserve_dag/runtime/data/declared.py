"""Whether a value is of the type that its code declares, as far as a look at the value itself tells.

A scalar is looked at, a container's own type, and the class of a message. What is in a container is not, for that would
cost as much as the function. `plain.build` looks at everything, where data comes from outside.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torchserve_dag.runtime.data import plain

As = Callable[[Any], Any]
"""Gives back a value that is of a type; a scalar of numpy or torch, a list or a tuple, as that type. Raises
WrongTypeError.
"""


class WrongTypeError(TypeError):
    """A value is not of the type that its code declares. The message is a sentence for the client and the log."""

    def __init__(self, who: str, value: Any, kind: Any) -> None:
        super().__init__(f"{who} gave {plain.kind_of(value)}, where {plain.name_of(kind)} is declared.")


def as_declared(kind: Any, who: str, *, also: tuple[type, ...] = ()) -> As | None:
    """What looks at the values that `who` gives; None where every value fits. `also` fits always."""
    members = [_plain_type(member) for member in (typing.get_args(kind) if plain.is_union(kind) else (kind,))]
    looks = [_look_at(member) for member in members]
    if None in looks:
        return None
    exact = frozenset(found for member in members for found in _exact(member))

    def check(value: Any) -> Any:
        if type(value) in exact:
            return value
        for look in looks:
            found = look(value)  # type: ignore[misc]  # none is None
            if found is not _WRONG:
                return found
        if isinstance(value, also):
            return value
        raise WrongTypeError(who, value, kind)

    return check


_WRONG: Any = object()
"""A look's result for a value of another type."""


def _plain_type(kind: Any) -> Any:
    """The type behind a name for it."""
    while True:
        if typing.get_origin(kind) is typing.Annotated:
            kind = typing.get_args(kind)[0]
        elif hasattr(kind, "__supertype__") or type(kind).__name__ == "TypeAliasType":
            kind = kind.__supertype__ if hasattr(kind, "__supertype__") else kind.__value__
        else:
            return dict if typing.is_typeddict(kind) else kind


def _exact(kind: Any) -> set[type]:
    """The classes whose values need no look."""
    if kind is None:
        return {type(None)}
    if kind is float:
        return {float, int}
    origin = typing.get_origin(kind) or kind
    if origin is tuple:
        return set() if _fixed(kind) is not None else {tuple}
    return {origin} if isinstance(origin, type) else set()


def _look_at(kind: Any) -> Callable[[Any], Any] | None:
    """What looks at a value whose class is not the type itself; None for a type that every value fits."""
    origin = typing.get_origin(kind) or kind
    if origin is Literal:
        choices = typing.get_args(kind)
        return lambda value: next((one for one in choices if type(one) is type(value) and one == value), _WRONG)
    if kind in {None, type(None)}:
        return lambda value: None if value is None else _WRONG
    if kind in {bool, int, float, str}:
        return lambda value: _scalar(kind, value)
    if origin is list:
        return lambda value: value if isinstance(value, list) else list(value) if isinstance(value, tuple) else _WRONG
    if origin is tuple:
        length = _fixed(kind)
        return lambda value: _tuple(length, value)
    if origin is dict:
        origin = Mapping
    return _instance(origin)


def _instance(kind: Any) -> Callable[[Any], Any] | None:
    if kind is object or getattr(kind, "_is_protocol", False):
        return None
    try:
        isinstance(None, kind)
    except TypeError:  # Any, a type variable, a name that is written as text
        return None
    return lambda value: value if isinstance(value, kind) else _WRONG


def _scalar(kind: type, value: Any) -> Any:
    value = plain.scalar(value)
    if isinstance(value, bool) and kind is not bool:
        return _WRONG
    return value if isinstance(value, (int, float) if kind is float else kind) else _WRONG


def _tuple(length: int | None, value: Any) -> Any:
    if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
        return _WRONG
    return value if isinstance(value, tuple) else tuple(value)


def _fixed(kind: Any) -> int | None:
    """The length of a tuple's type that has one."""
    parts = typing.get_args(kind)
    return None if not parts or parts[-1] is ... else len(parts)
