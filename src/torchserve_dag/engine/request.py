"""A request on its way through a graph, and the items that it becomes at a node."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from torchserve_dag.engine.graph import Node
from torchserve_dag.messages import InputError, Skipped

MAX_ELEMENTS = 10_000
"""Elements that one `each` may fan out over; a request with more is refused."""


@dataclass(eq=False)
class Request:
    """One request on its way through the graph."""

    id: str
    deadline: float
    """On time.monotonic()'s clock."""
    values: dict[str, Any]
    """What is known so far: the parameters, the decoded request, and each ended node's result."""
    waits: dict[str, int]
    """For each node that has not started: how many that it needs have not ended."""
    future: Future[Any] = field(default_factory=Future)
    """The answer, or a Failure. It always comes, at the deadline at the latest."""
    gathers: dict[str, Gather] = field(default_factory=dict)
    ended: bool = False


@dataclass
class Gather:
    """The answers of an `each` node's items, in order, and how many are still to come."""

    answers: list[Any]
    missing: int


@dataclass(slots=True)
class Item:
    request: Request
    index: int | None
    """Its index in the `each` list; None for a node that runs once."""
    value: Any
    since: float = field(default_factory=time.monotonic)


def items_of(request: Request, node: Node, values: Mapping[str, Any]) -> tuple[list[Item], Any]:
    """A ready node's items; where there are none, its result. Raises InputError for too many."""
    if node.each is None:
        value = _value(node, values)
        return ([], value) if isinstance(value, Skipped) else ([Item(request, None, value)], None)
    elements = node.each.evaluate(values)
    if isinstance(elements, Skipped):
        return [], elements
    if len(elements) > MAX_ELEMENTS:
        raise InputError(
            f"{node.each.text} has {len(elements):,} elements; the limit is {MAX_ELEMENTS:,}.",
            HTTPStatus.UNPROCESSABLE_ENTITY,
        )
    answers: list[Any] = [None] * len(elements)
    items: list[Item] = []
    here = dict(values)
    for index, element in enumerate(elements):
        here["item"] = element
        value = element if isinstance(element, Skipped) else _value(node, here)
        if isinstance(value, Skipped):
            answers[index] = value
        else:
            items.append(Item(request, index, value))
    request.gathers[node.name] = Gather(answers, len(items))
    return items, answers


def _value(node: Node, values: Mapping[str, Any]) -> Any:
    """What a node takes for one item, or Skipped."""
    if node.when is not None and not node.when.evaluate(values):
        return Skipped(node.name)
    taken = {parameter: expression.evaluate(values) for parameter, expression in node.takes.items()}
    for parameter, value in taken.items():
        if isinstance(value, Skipped) and parameter not in node.sees_skipped:
            return value
    return taken["item"] if node.handler else taken
