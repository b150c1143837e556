"""Plain data (what JSON and YAML hold) to typed values and back.

`build(type, data)` follows the type hints and reports every mistake with its path, so that a caller can add line
numbers. It needs only the standard library, because an archive must run where no other package is installed.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import json
import math
import types
import typing
from collections.abc import Container, Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

from torchserve_dag.runtime.messages import WrongFieldError

MOST_BITS = 64
"""A whole number with more would make numpy, torch and other languages fail."""

T = TypeVar("T")
Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Wrong:
    """A mistake in plain data."""

    path: Path
    what: str
    help: str = ""
    at_key: bool = False
    """Whether the key itself is wrong, instead of its value."""


class WrongDataError(Exception):
    """Plain data does not fit its type; `wrongs` has every mistake."""

    def __init__(self, wrongs: list[Wrong]) -> None:
        self.wrongs = wrongs
        super().__init__("; ".join(f"{dotted(w.path)}: {w.what}" if w.path else w.what for w in wrongs))


def dotted(path: Path) -> str:
    """`("nodes", "a", 0)` → `nodes.a[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def did_you_mean(name: str, known: list[str]) -> str:
    """A hint for a misspelt name: the closest known name, or all known names."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f'did you mean "{close[0]}"?'
    return f"known: {', '.join(sorted(known))}" if known else ""


def build(kind: type[T], data: Any) -> T:
    """Plain data as a value of type `kind`. Raises WrongDataError with every mistake."""
    wrongs: list[Wrong] = []
    value = _build(kind, data, (), wrongs)
    if wrongs:
        raise WrongDataError(wrongs)
    return value  # type: ignore[no-any-return]


def flatten(value: Any) -> Any:
    """A typed value as plain data: dataclasses become dicts, tuples lists, scalars of numpy and torch Python's.

    A dataclass with `leaves_out_none` has no key for a field that is None.
    """
    if type(value) in _SCALARS:
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {name: getattr(value, name) for name in field_types(type(value))}
        if getattr(value, "leaves_out_none", False):
            fields = {name: field for name, field in fields.items() if field is not None}
        return {name: flatten(field) for name, field in fields.items()}
    if isinstance(value, Mapping):
        return {str(key): flatten(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [flatten(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return scalar(value)


_SCALARS = {str, int, float, bool, type(None)}


def scalar(value: Any) -> Any:
    """A scalar of numpy or torch, which may be an array without dimensions, as Python's; any other value as it is."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


class UnwritableError(ValueError):
    """A value has a part that JSON cannot hold."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{dotted(path) or 'it'} is {what}")
        self.path = path
        self.what = what

    def at(self, *path: str | int) -> UnwritableError:
        """The same, of the value that has this one at `path`."""
        return UnwritableError((*path, *self.path), self.what)


def to_json(value: Any) -> bytes:
    """A typed value as JSON. Raises UnwritableError, which names the part of it."""
    try:
        text = json.dumps(flatten(value), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise _unwritable(value, ()) or UnwritableError((), f"{kind_of(value)}, {error}") from error


def _unwritable(value: Any, path: Path) -> UnwritableError | None:
    """The first part that JSON cannot hold."""
    if len(path) > _MAX_DEPTH:
        return UnwritableError(path[:3], "nested too deeply, or contains itself")
    value = scalar(value.value if isinstance(value, enum.Enum) else value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts: Iterable[tuple[str | int, Any]] = ((name, getattr(value, name)) for name in field_types(type(value)))
    elif isinstance(value, Mapping):
        parts = ((str(key), part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    elif isinstance(value, float) and not math.isfinite(value):
        return UnwritableError(path, f"{value}, which JSON does not have")
    elif isinstance(value, str):
        lone = any("\ud800" <= character <= "\udfff" for character in value)
        return UnwritableError(path, "text with half a surrogate pair") if lone else None
    else:
        return None if value is None or isinstance(value, int | float) else UnwritableError(path, kind_of(value))
    return next(filter(None, (_unwritable(part, (*path, name)) for name, part in parts)), None)


_MAX_DEPTH = 100


def kind_of(value: Any) -> str:
    """What a value is, in words: `str`, `Label`, `torch.Tensor of shape (3,)`."""
    if value is None or isinstance(value, type):
        return "nothing" if value is None else f"the type {value.__name__}"
    kind, shape = type(value), getattr(value, "shape", None)
    top = kind.__module__.partition(".")[0]
    own = dataclasses.is_dataclass(value) or top == "builtins" or top.startswith("torchserve_dag")
    name = kind.__name__ if own else f"{top}.{kind.__name__}"
    return f"{name} of shape {tuple(shape)}" if isinstance(shape, tuple) and shape else name


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """A dataclass's fields and their resolved types."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def missing(kind: Any, given: Container[str]) -> list[str]:
    """The fields of a dataclass that need a value, and are not among those given."""
    return [
        field.name
        for field in dataclasses.fields(kind)
        if field.name not in given
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]


_NAMES = {None: "nothing", type(None): "nothing", Any: "anything", ...: "..."}


def is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in {Union, types.UnionType}


def name_of(kind: Any) -> str:
    """A type as an author writes it: `list[Photo | Skipped]`."""
    if kind in _NAMES:
        return _NAMES[kind]
    if is_union(kind):
        return " | ".join(name_of(part) for part in typing.get_args(kind))
    origin = typing.get_origin(kind)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(kind))
    if origin is not None:
        return f"{name_of(origin)}[{', '.join(name_of(a) for a in typing.get_args(kind))}]"
    return getattr(kind, "__name__", str(kind))


def given(kind: Any) -> Any:
    """A type without None: what a field holds where it is given."""
    parts = [part for part in typing.get_args(kind) if part is not type(None)] if is_union(kind) else []
    return Union[tuple(parts)] if parts else kind  # noqa: UP007 (made from a list)


def unresolved(kind: Any, outer: frozenset[Any] = frozenset()) -> str:
    """Why a type's fields are not known, at any depth: an annotation that names nothing. Empty where all are."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind not in outer:
        try:
            parts: Iterable[Any] = field_types(kind).values()
        except Exception as error:  # noqa: BLE001 (annotations are the user's, and evaluated)
            return f"the fields of {kind.__name__}: {error}"
        outer |= {kind}
    else:
        parts = typing.get_args(kind)
    return next(filter(None, (unresolved(part, outer) for part in parts)), "")


def fits_json(kind: Any, outer: frozenset[type] = frozenset()) -> bool:
    """Whether a value of this type survives a round trip through JSON. `outer`: the dataclasses around it."""
    if kind in {Any, str, int, float, bool, None, type(None)} or kind in outer:
        return True
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return True
    if origin is dict and parts[0] is not str:
        return False
    if origin in {list, tuple, dict} or is_union(kind):
        return all(fits_json(part, outer) for part in parts if part is not ...)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return all(fits_json(part, outer | {kind}) for part in field_types(kind).values())
    return isinstance(kind, type) and issubclass(kind, enum.Enum) and all(type(one.value) in _SCALARS for one in kind)


def _build(kind: Any, data: Any, path: Path, wrongs: list[Wrong]) -> Any:  # noqa: C901, PLR0911 (one return a kind)
    if kind is Any:
        return data
    if is_union(kind):
        return _build_union(kind, data, path, wrongs)
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if data in choices:
            return data
        return _refuse(kind, data, path, wrongs)
    if origin is list:
        if not isinstance(data, list):
            return _refuse(kind, data, path, wrongs)
        (item,) = typing.get_args(kind)
        return [_build(item, part, (*path, i), wrongs) for i, part in enumerate(data)]
    if origin is dict:
        if not isinstance(data, Mapping):
            return _refuse(kind, data, path, wrongs)
        name, item = typing.get_args(kind)
        if name is str:  # YAML reads `on:` as the key True, and `1:` as a number
            wrongs.extend(
                Wrong((*path, key), f"the key {key} is not text", "put it in quotes", at_key=True)
                for key in data
                if not isinstance(key, str)
            )
        return {key: _build(item, part, (*path, key), wrongs) for key, part in data.items()}
    if origin is tuple:
        return _build_tuple(kind, data, path, wrongs)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _build_enum(kind, data, path, wrongs)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, data, path, wrongs)  # type: ignore[arg-type]
    return _build_scalar(kind, data, path, wrongs)


def _build_union(kind: Any, data: Any, path: Path, wrongs: list[Wrong]) -> Any:
    options = typing.get_args(kind)
    if data is None and type(None) in options:
        return None
    options = tuple(o for o in options if o is not type(None))
    best: list[Wrong] | None = None
    for option in options:
        mistakes: list[Wrong] = []
        value = _build(option, data, path, mistakes)
        if not mistakes:
            return value
        nearer = best is None or len(mistakes) < len(best)  # of two messages, the one that the client meant
        if nearer and (len(options) == 1 or any(len(w.path) > len(path) for w in mistakes)):
            best = mistakes
    wrongs.extend(best or [Wrong(path, _expected(kind, data))])
    return None


def _build_tuple(kind: Any, data: Any, path: Path, wrongs: list[Wrong]) -> Any:
    if not isinstance(data, list | tuple):
        return _refuse(kind, data, path, wrongs)
    items = typing.get_args(kind)
    if items[1:] == (...,):
        items = items[:1] * len(data)
    if len(items) != len(data):
        wrongs.append(Wrong(path, f"expected {len(items)} items, not {len(data)}"))
        return None
    return tuple(_build(item, part, (*path, i), wrongs) for i, (item, part) in enumerate(zip(items, data, strict=True)))


def _build_enum(kind: type[enum.Enum], data: Any, path: Path, wrongs: list[Wrong]) -> Any:
    for member in kind:
        if type(member.value) is type(data) and member.value == data:
            return member
    return _refuse(kind, data, path, wrongs)


def _build_dataclass(kind: type, data: Any, path: Path, wrongs: list[Wrong]) -> Any:
    if not isinstance(data, Mapping):
        return _refuse(kind, data, path, wrongs)
    hints = field_types(kind)
    before = len(wrongs)
    values: dict[str, Any] = {}
    for key, part in data.items():
        if key not in hints:
            wrongs.append(Wrong((*path, key), f'unknown key "{key}"', did_you_mean(str(key), list(hints)), at_key=True))
        else:
            values[key] = _build(hints[key], part, (*path, key), wrongs)
    wrongs.extend(Wrong(path, f'"{name}" is missing') for name in missing(kind, data))
    if len(wrongs) > before:
        return None
    try:
        return kind(**values)
    except ValueError as error:  # a dataclass's own __post_init__ says no
        where = error.path if isinstance(error, WrongFieldError) else ()
        wrongs.append(Wrong((*path, *where), str(error)))
        return None


def _build_scalar(kind: Any, data: Any, path: Path, wrongs: list[Wrong]) -> Any:
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        try:
            return float(data)
        except OverflowError:
            return _refuse(kind, data, path, wrongs)
    if isinstance(data, bool) and kind is not bool:
        return _refuse(kind, data, path, wrongs)
    too_large = kind is int and isinstance(data, int) and data.bit_length() > MOST_BITS
    if isinstance(kind, type) and isinstance(data, kind) and not too_large:
        return data
    if kind is str and isinstance(data, int | float):
        wrongs.append(Wrong(path, f"{data} is a number where text is meant", "put it in quotes"))
        return None
    return _refuse(kind, data, path, wrongs)


_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
    tuple: "a list",
}


def _expected(kind: Any, data: Any) -> str:
    shown = repr(data) if isinstance(data, str | int | float | bool) or data is None else name_of(type(data))
    shown = shown if len(shown) <= 60 else shown[:57] + "..."  # noqa: PLR2004
    origin = typing.get_origin(kind)
    word = "a mapping" if dataclasses.is_dataclass(kind) else _WORDS.get(origin or kind) or name_of(kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        word += f" ({', '.join(repr(member.value) for member in kind)})"
    if kind is int and type(data) is int:
        word += f" of at most {MOST_BITS} bits"
    return f"expected {word}, not {shown}"


def _refuse(kind: Any, data: Any, path: Path, wrongs: list[Wrong]) -> None:
    wrongs.append(Wrong(path, _expected(kind, data)))
