"""The types of a node's code: of its parameters, and of its answer for one item; a function says them itself."""

from __future__ import annotations

import collections.abc
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.graph.kinds import FunctionCode, Kind
from torchserve_dag.runtime.graph.problems import Place, Problems

_YIELDS = {collections.abc.Iterator, collections.abc.Generator}
_YIELDS_LATER = {collections.abc.AsyncIterator, collections.abc.AsyncGenerator}

ONE = "item"
"""The name of the only parameter of code that is called with one value."""


@dataclass(frozen=True)
class Signature:
    """Code, with the types of its parameters and of its answer for one item."""

    called: str
    """Its name in messages."""
    kind: Kind
    takes: Mapping[str, Any]
    gives: Any
    optional: frozenset[str] = frozenset()
    yields: bool = False
    feeds: frozenset[str] = frozenset()
    """The parameters that take chunks as they come; each takes the list of them, as far as types go."""


def signature_of(place: Place, function: Callable[..., Any], problems: Problems) -> Signature | None:
    """The signature of a function; None if there are problems, which are added at `place`."""
    called = function.__name__
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:  # noqa: BLE001 (annotations are the user's, and evaluated)
        problems.add(place, f"the annotations of {called}: {error}")
        return None
    parameters = inspect.signature(function).parameters
    feeds = frozenset(p for p in parameters if typing.get_origin(hints.get(p)) is collections.abc.AsyncIterator)
    before = len(problems)
    _check_form(place, function, feeds, problems)
    untyped = [p for p in (*parameters, "return") if p not in hints]
    if untyped:
        problems.add(place, f"{called} does not say the type of {', '.join(untyped)}", "annotate it")
    for reason in dict.fromkeys(filter(None, map(plain.unresolved, hints.values()))):
        problems.add(place, f"the annotations of {called}: {reason}")
    gives = hints.get("return")
    yields = (typing.get_origin(gives) or gives) in (_YIELDS_LATER if feeds else _YIELDS)
    if yields:
        if not typing.get_args(gives):
            problems.add(place, f"{called} does not say what it yields", "write like Iterator[Text]")
        gives = (typing.get_args(gives) or (Any,))[0]
    if len(problems) > before:
        return None
    optional = frozenset(p for p, v in parameters.items() if v.default is not inspect.Parameter.empty)
    takes = {p: _list_of_chunks(hints[p]) if p in feeds else hints[p] for p in parameters}
    return Signature(called, FunctionCode(function), takes, gives, optional, yields, feeds)


def _check_form(place: Place, function: Callable[..., Any], feeds: frozenset[str], problems: Problems) -> None:
    called, later = function.__name__, inspect.isasyncgenfunction(function)
    if inspect.iscoroutinefunction(function) or (later and not feeds):
        problems.add(place, f"{called} is a coroutine", "write def, without async")
    elif feeds and not later:
        what = f"{called} takes an AsyncIterator, so it has to take its chunks as they come"
        problems.add(place, what, "write async def, async for and yield")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}:
            what = f"{called}'s parameter {parameter.name} cannot be given by its name"
            problems.add(place, what, "write it without * and /")


def _list_of_chunks(kind: Any) -> Any:
    (chunk,) = typing.get_args(kind)
    return list[chunk]  # type: ignore[valid-type]
