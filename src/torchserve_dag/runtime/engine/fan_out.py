"""From a ready node to its items: one, or one for each element of its `each`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from torchserve_dag.runtime.engine.feed import Feed
from torchserve_dag.runtime.engine.gather import PENDING, Gather
from torchserve_dag.runtime.engine.request import Item, Request
from torchserve_dag.runtime.graph.graph import Code, Node
from torchserve_dag.runtime.messages import InputError, Skipped

MAX_ELEMENTS = 10_000
"""The limit of elements in one `each`, and of chunks from one node without an engine of its own; a request with more
fails."""


def fan_out(request: Request, node: Node, values: Mapping[str, Any]) -> tuple[Gather | None, list[Item], Any]:
    """A ready node's gather and items; for a skipped node, None, no items, and the Skipped.

    Raises InputError for too many elements.
    """
    if node.when is not None and not node.each and not node.when.evaluate(values):
        return None, [], Skipped(node.name)
    if not node.each:
        gather = Gather([PENDING], 1, open=node.code.yields)
        item = _make_item(request, node, values, gather.answers, 0)
        if isinstance(item, Skipped):
            return None, [], item
        if node.code.yields:
            gather.answers = item.answers = []
        return gather, [item], None
    elements = node.each[0].list.evaluate(values)
    if isinstance(elements, Skipped):
        return None, [], elements
    gather, loops = Gather([]), _Loops(request, node, values)
    loops.run(elements, 0, gather.answers)
    gather.pending, gather.skipped = len(loops.items), loops.skipped
    return gather, loops.items, None


def follow(
    request: Request, node: Node, values: Mapping[str, Any], answers: list[Any], chunks: Sequence[tuple[int, Any]]
) -> list[Item]:
    """Items for new chunks (index, chunk) of the stream that a node follows; a skipped chunk is answered here."""
    items = []
    scope = dict(values)
    for index, chunk in chunks:
        if isinstance(chunk, Skipped):
            answers[index] = chunk
            continue
        scope[node.each[0].name] = chunk
        item = _item_or_skipped(request, node, scope, answers, index)
        if item is not None:
            items.append(item)
    return items


def too_many(what: str, count: int) -> InputError:
    message = f"{what} has {count:,} elements; the limit is {MAX_ELEMENTS:,}."
    return InputError(message, HTTPStatus.UNPROCESSABLE_ENTITY)


class _Loops:
    """A node's nested loops: an item for each innermost element, and a place for its answer."""

    def __init__(self, request: Request, node: Node, values: Mapping[str, Any]) -> None:
        self.request = request
        self.node = node
        self.scope = dict(values)
        """The request's values, and the current element of each loop."""
        self.items: list[Item] = []
        self.elements = 0
        self.skipped = 0

    def run(self, elements: Sequence[Any], level: int, answers: list[Any]) -> None:
        loop = self.node.each[level]
        self.elements += len(elements)
        if self.elements > MAX_ELEMENTS:
            raise too_many(loop.list.text, self.elements)
        for index, element in enumerate(elements):
            self.scope[loop.name] = element
            if isinstance(element, Skipped):
                answers.append(element)
                self.skipped += 1
            elif level + 1 < len(self.node.each):
                answers.append(self._run_inner(level + 1))
            else:
                answers.append(PENDING)
                item = _item_or_skipped(self.request, self.node, self.scope, answers, index)
                if item is None:
                    self.skipped += 1
                else:
                    self.items.append(item)

    def _run_inner(self, level: int) -> list[Any] | Skipped:
        elements = self.node.each[level].list.evaluate(self.scope)
        if isinstance(elements, Skipped):
            return elements
        answers: list[Any] = []
        self.run(elements, level, answers)
        return answers


def _item_or_skipped(
    request: Request, node: Node, scope: Mapping[str, Any], answers: list[Any], index: int
) -> Item | None:
    """The item of one element; None if the element is skipped, with the Skipped written as its answer."""
    if node.when is not None and not node.when.evaluate(scope):
        answers[index] = Skipped(node.name)
        return None
    item = _make_item(request, node, scope, answers, index)
    if isinstance(item, Skipped):
        answers[index] = item
        return None
    return item


def _make_item(
    request: Request, node: Node, scope: Mapping[str, Any], answers: list[Any], index: int
) -> Item | Skipped:
    for branch in node.branches:
        if branch.when is None or branch.when.evaluate(scope):
            value = _input_of(branch.code, request, scope)
            if isinstance(value, Skipped):
                return value
            fallbacks = node.policy.fallbacks
            fallback_values = [_input_of(code, request, scope) for code in fallbacks] if fallbacks else ()
            return Item(request, node, branch.code, value, answers, index, fallback_values)
    return Skipped(node.name)


def _input_of(code: Code, request: Request, scope: Mapping[str, Any]) -> Any:
    """The input of a code for one item, or Skipped."""
    feeds = code.feeds
    if feeds:
        inputs = {p: Feed(request, feeds[p]) if p in feeds else e.evaluate(scope) for p, e in code.takes.items()}
    else:
        inputs = {p: e.evaluate(scope) for p, e in code.takes.items()}
    for parameter, value in inputs.items():
        if isinstance(value, Skipped) and parameter not in code.sees_skipped:
            return value
    return inputs if code.kind.by_name else inputs["item"]
