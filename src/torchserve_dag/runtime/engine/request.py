"""A request on its way through a graph, and the items that it becomes at a node."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.graph.graph import Code, Node
from torchserve_dag.runtime.messages import Failure, InputError, Skipped

if TYPE_CHECKING:
    from torchserve_dag.runtime.engine.plan import Plan
    from torchserve_dag.runtime.engine.span import Span
    from torchserve_dag.runtime.engine.station import Station

MAX_ELEMENTS = 10_000
"""Elements that one `each` may fan out over, and pieces that a node may yield; a request with more is refused."""

CANCELLED = Failure(499, "The client cancelled the request.", "Cancelled")

PENDING: Any = object()
"""Stands in a list of answers where one is still to come."""


@dataclass(eq=False)
class Request:
    """One request on its way through a graph; or an item's, through the workflow that its node runs."""

    id: str
    plan: Plan
    deadline: float
    """On time.monotonic()'s clock."""
    values: dict[str, Any]
    """What is known so far: the parameters, the decoded request, and each ended node's result."""
    finish: Callable[[Any], None]
    """Called once, with the answer or a Failure."""
    end: Callable[[Request, Any], None]
    """The engine's own way to end it."""
    options: Options = field(default_factory=Options)
    parent: Item | None = None
    """The item whose node runs this workflow."""
    on_piece: Callable[[Any], None] | None = None
    future: Future[Any] = field(default_factory=Future)
    """The answer, or a Failure. It always comes, at the deadline at the latest."""
    waits: dict[str, int] = field(default_factory=dict)
    """For each node that has not started: how many that it needs have not ended."""
    gathers: dict[str, Gather] = field(default_factory=dict)
    """By node that has started."""
    away: dict[Item, Callable[[], None]] = field(default_factory=dict)
    """The items that run elsewhere, and how to call each off."""
    ended: bool = False
    pieces: Pieces | None = None
    spans: list[Span] = field(default_factory=list)
    began_ns: int = 0

    def __post_init__(self) -> None:
        self.waits = dict(self.plan.waits)
        self._outermost = (
            self.parent.request.root if self.parent else None
        )  # never itself: photos wait for no collector

    @property
    def root(self) -> Request:
        """The client's request, which this one is or is inside of."""
        return self._outermost or self

    @property
    def over(self) -> bool:
        """Whether nobody waits for its answer any more."""
        return self.ended or (self.parent is not None and self.parent.over)

    def cancel(self) -> None:
        """Stop its work; the future gives a Failure with the status 499."""
        self.end(self, CANCELLED)


@dataclass
class Pieces:
    """What of a streaming answer has been given to the client."""

    gather: Gather
    sent: int = 0
    sending: bool = False
    """Whether a thread is at it; only one is, so that they stay in order."""
    end: tuple[Any] | None = None
    """The request's answer or Failure, which must wait for them."""

    def take(self) -> list[Any]:
        """Those that are ready and have not been taken."""
        ready = [answer for _, answer in self.gather.ready_from(self.sent)]
        self.sent += len(ready)
        return ready

    def break_off(self, failure: Failure) -> None:
        """No more can be given; the end is this."""
        self.gather, self.sent, self.end = Gather([]), 0, (failure,)

    def take_end(self) -> tuple[Any] | None:
        end, self.end = self.end, None
        return end


@dataclass
class Gather:
    """The answers of a node's items, in order, and how many are still to come."""

    answers: list[Any]
    """One for a node that runs once; lists in lists for nested loops."""
    missing: int = 0
    open: bool = False
    """Whether more items may come: its node yields, or follows one that does."""
    fed: int = 0
    """Of a follower: how many pieces have become items."""
    skipped: int = 0
    ended: bool = False

    def ready_from(self, first: int) -> list[tuple[int, Any]]:
        """The answers from a place on, with their places, as far as none is missing."""
        ready = itertools.takewhile(lambda answer: answer is not PENDING, itertools.islice(self.answers, first, None))
        return list(enumerate(ready, first))

    def complete(self) -> bool:
        """Whether the last answer has come; true once."""
        if self.ended or self.missing or self.open:
            return False
        self.ended = True
        return True


class _Weak:
    __slots__ = ("__weakref__",)  # deadlines do not keep what they are about


@dataclass(eq=False, slots=True)
class Item(_Weak):
    request: Request
    node: Node
    code: Code
    """What runs it: one of its node's branches, or the fallback."""
    value: Any
    slot: list[Any]
    """Where its answer belongs …"""
    index: int
    """… and at which place."""
    stand_in: Any = None
    """What the fallback would take."""
    tries: int = 0
    """Those that have failed."""
    since: float = field(default_factory=time.monotonic)
    done: bool = False

    @property
    def station(self) -> Station:
        return self.request.plan.stations[self.code.name]

    def again(self) -> Item:
        """Its next try: an answer that still comes from this one is dropped."""
        return Item(
            self.request, self.node, self.code, self.value, self.slot, self.index, self.stand_in, self.tries + 1
        )

    def fallen_back(self, code: Code) -> Item:
        """What runs in its stead."""
        return Item(self.request, self.node, code, self.stand_in, self.slot, self.index)

    @property
    def over(self) -> bool:
        """Whether nobody waits for its answer any more."""
        return self.done or self.request.over


def begin(request: Request, node: Node, values: Mapping[str, Any]) -> tuple[Gather | None, list[Item], Any]:
    """A ready node's items and where they gather; or no gather, and its result.

    Raises InputError for too many elements.
    """
    if node.when is not None and not node.each and not node.when.evaluate(values):
        return None, [], Skipped(node.name)
    if not node.each:
        gather = Gather([PENDING], 1, open=node.code.yields)
        item = _item(request, node, values, gather.answers, 0)
        if isinstance(item, Skipped):
            return None, [], item
        if node.code.yields:
            gather.answers = item.slot = []
        return gather, [item], None
    first = node.each[0].list.evaluate(values)
    if isinstance(first, Skipped):
        return None, [], first
    gather, loops = Gather([]), _Loops(request, node, values)
    loops.run(first, 0, gather.answers)
    gather.missing, gather.skipped = len(loops.items), loops.skipped
    return gather, loops.items, None


def feed(
    request: Request, node: Node, values: Mapping[str, Any], gather: Gather, new: Sequence[tuple[int, Any]]
) -> list[Item]:
    """A follower's items for pieces that have come, each with its place; what is skipped gets its answer here."""
    items = []
    here = dict(values)
    for index, piece in new:
        if isinstance(piece, Skipped):
            gather.answers[index] = piece
            continue
        here[node.each[0].name] = piece
        made = _item_of(request, node, here, gather.answers, index)
        if made is not None:
            items.append(made)
    return items


class _Loops:
    """A node's loops at work: items for the innermost elements, and a place for each answer."""

    def __init__(self, request: Request, node: Node, values: Mapping[str, Any]) -> None:
        self.request = request
        self.node = node
        self.here = dict(values)
        self.items: list[Item] = []
        self.elements = 0
        self.skipped = 0

    def run(self, elements: Sequence[Any], level: int, answers: list[Any]) -> None:
        loop = self.node.each[level]
        self.elements += len(elements)
        if self.elements > MAX_ELEMENTS:
            raise too_many(loop.list.text, self.elements)
        for index, element in enumerate(elements):
            self.here[loop.name] = element
            if isinstance(element, Skipped):
                answers.append(element)
                self.skipped += 1
            elif level + 1 < len(self.node.each):
                answers.append(self._inner(level + 1))
            else:
                answers.append(PENDING)
                item = _item_of(self.request, self.node, self.here, answers, index)
                if item is None:
                    self.skipped += 1
                else:
                    self.items.append(item)

    def _inner(self, level: int) -> list[Any] | Skipped:
        elements = self.node.each[level].list.evaluate(self.here)
        if isinstance(elements, Skipped):
            return elements
        answers: list[Any] = []
        self.run(elements, level, answers)
        return answers


def _item_of(request: Request, node: Node, here: Mapping[str, Any], answers: list[Any], index: int) -> Item | None:
    """One element's item; where it is skipped, its answer is put into its place."""
    if node.when is not None and not node.when.evaluate(here):
        answers[index] = Skipped(node.name)
        return None
    item = _item(request, node, here, answers, index)
    if isinstance(item, Skipped):
        answers[index] = item
        return None
    return item


def _item(request: Request, node: Node, values: Mapping[str, Any], slot: list[Any], index: int) -> Item | Skipped:
    for branch in node.branches:
        if branch.when is None or branch.when.evaluate(values):
            value = _taken(branch.code, values)
            if isinstance(value, Skipped):
                return value
            fallback = node.policy.fallback
            stand_in = _taken(fallback, values) if fallback else None
            return Item(request, node, branch.code, value, slot, index, stand_in)
    return Skipped(node.name)


def _taken(code: Code, values: Mapping[str, Any]) -> Any:
    """What code takes of one item, or Skipped."""
    taken = {parameter: expression.evaluate(values) for parameter, expression in code.takes.items()}
    for parameter, value in taken.items():
        if isinstance(value, Skipped) and parameter not in code.sees_skipped:
            return value
    return taken if code.kind.by_name else taken["item"]


def too_many(what: str, count: int) -> InputError:
    message = f"{what} has {count:,} elements; the limit is {MAX_ELEMENTS:,}."
    return InputError(message, HTTPStatus.UNPROCESSABLE_ENTITY)
