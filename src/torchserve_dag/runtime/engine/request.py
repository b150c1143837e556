"""A request on its way through a graph, and the items that its nodes become."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.engine.counts import Written
from torchserve_dag.runtime.engine.gather import PENDING, Gather
from torchserve_dag.runtime.engine.plan import Plan
from torchserve_dag.runtime.engine.runner import Cancel, ChunkSource, Release, Stream
from torchserve_dag.runtime.engine.span import Attribute, Span
from torchserve_dag.runtime.engine.station import Station
from torchserve_dag.runtime.engine.streaming import AnswerStream
from torchserve_dag.runtime.graph.graph import Code, Node
from torchserve_dag.runtime.messages import Failure, Usage

CANCELLED = Failure(499, "The client cancelled the request.", "Cancelled")


@dataclass(eq=False)
class Request:
    """A client's request on its way through a graph; or an item's, through the sub-workflow that its node runs."""

    id: str
    plan: Plan[Item]
    deadline: float
    """On time.monotonic()'s clock."""
    values: dict[str, Any]
    """What its expressions read: the parameters, the decoded request, and the result of each node that has ended."""
    on_answer: Callable[[Any], None]
    """Gives the client the answer or a Failure; called once, when `answered` is true."""
    end_request: Callable[[Request, Any], None]
    """The engine's: ends a request with an answer or a Failure; does nothing if the request is `answered` already."""
    options: Options = field(default_factory=Options)
    parent: Item | None = None
    """For a sub-workflow's request: the item of the outer workflow that it answers."""
    stream: AnswerStream[Item] | None = None
    """Set where the client gets the answer in chunks."""
    future: Future[Any] = field(default_factory=Future)
    """The answer, or a Failure, at the deadline at the latest."""
    waits: dict[str, int] = field(init=False)
    """For each node that has not started: how many of the nodes that it needs have not ended."""
    gathers: dict[str, Gather] = field(default_factory=dict)
    """The answers so far, for each node that has started."""
    stopped: set[str] = field(default_factory=set)
    """The nodes that another has ended early."""
    waiting: dict[str, tuple[Item, ChunkSource]] = field(default_factory=dict)
    """For each node with a function that waits for another node's chunk: its item, and whose chunk that is."""
    elsewhere: dict[Item, Cancel] = field(default_factory=dict)
    """The request's items that run elsewhere, and how to cancel each."""
    pixels: int = 0
    """How many pixels its message holds in memory, as long as it is in progress."""
    answered: bool = False
    """Whether the answer or a Failure is decided; `on_answer` is called shortly after."""
    idle_s: float | None = None
    """Of an answer that streams: each chunk moves the deadline so far into the future."""
    usage: Usage = field(default_factory=Usage)
    """The tokens that the request's models have counted so far; of the client's own request, those of sub-workflows,
    too."""
    spans: list[Span] = field(default_factory=list)
    began_ns: int = 0
    began: float = field(default_factory=time.monotonic)
    """On time.monotonic()'s clock."""
    message: Any = PENDING
    """The decoded message, from the request's end on, until it is kept."""

    def __post_init__(self) -> None:
        self.waits = dict(self.plan.waits)
        # None for the client's own request: a reference to itself would keep images alive until the garbage collector
        # runs.
        self._root = self.parent.request.root if self.parent else None

    @property
    def root(self) -> Request:
        """The client's request: this one, or the outermost request around a sub-workflow's."""
        return self._root or self

    @property
    def obsolete(self) -> bool:
        """Whether nobody waits for the answer any more: this request is answered, or its parent is obsolete."""
        return self.answered or (self.parent is not None and self.parent.obsolete)

    def fail(self, failure: Failure) -> None:
        self.end_request(self, failure)

    def cancel(self) -> None:
        """Stop the request's work; its future gives a Failure with the status 499."""
        self.end_request(self, CANCELLED)


class _WeaklyReferenceable:
    __slots__ = ("__weakref__",)  # timers hold weak references, so that a deadline does not keep an item alive


@dataclass(eq=False, slots=True)
class Item(_WeaklyReferenceable):
    """One call of a node's code: for one element of the node's `each`, or for the whole request."""

    request: Request
    node: Node
    code: Code
    """The code that runs the item: a branch of its node, or a fallback."""
    value: Any
    answers: list[Any]
    """The list that the item's answer is written into …"""
    index: int
    """… and the index in that list."""
    fallback_values: Sequence[Any] = ()
    """What each fallback would be called with."""
    step: int = 0
    """Which code it is: 0 for the node's own, then its fallbacks."""
    round: int = 1
    failed_attempts: int = 0
    since: float = field(default_factory=time.monotonic)
    """When the item was queued, on time.monotonic()'s clock."""
    reserved: Release | None = None
    """Gives back what the engine of its model has reserved for it."""
    written: Written | None = None
    """What is known of its answer, once its first chunk has come by itself."""
    said: Mapping[str, Attribute] | None = None
    """What its answer, or its latest chunk, says of itself on its span."""
    settled: bool = False
    """Whether this attempt is over: it has its last answer, or another attempt or the fallback replaces it."""

    @property
    def station(self) -> Station[Item]:
        return self.request.plan.stations[self.code.name]

    def retry(self) -> Item:
        """The item for the next attempt; a late answer to this item is dropped."""
        value = self.value.inputs if isinstance(self.value, Stream) else self.value
        return self._next(self.code, value, self.step, self.round, self.failed_attempts + 1)

    def fall_back(self) -> Item:
        """The item that runs the next fallback instead of this one."""
        code, value = self.node.policy.fallbacks[self.step], self.fallback_values[self.step]
        return self._next(code, value, self.step + 1, self.round, 0)

    def again(self, answer: Any) -> Item:
        """The item of the next round, which gets this one's answer."""
        value = dict.fromkeys(self.code.takes, answer) if self.code.kind.by_name else answer
        return self._next(self.code, value, self.step, self.round + 1, 0)

    def _next(self, code: Code, value: Any, step: int, round_: int, failed_attempts: int) -> Item:
        return Item(
            self.request,
            self.node,
            code,
            value,
            self.answers,
            self.index,
            self.fallback_values,
            step,
            round_,
            failed_attempts,
        )

    @property
    def ended(self) -> bool:
        """Whether this attempt has its last answer, or has been given up, or its node has been ended early."""
        return self.settled or self.node.name in self.request.stopped

    @property
    def obsolete(self) -> bool:
        """Whether nobody waits for an answer any more: the item is settled, its node ended, or its request obsolete."""
        request = self.request
        if self.settled or request.answered or (request.stopped and self.node.name in request.stopped):
            return True
        return request.parent is not None and request.parent.obsolete
