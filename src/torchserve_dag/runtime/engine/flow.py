"""What an answer changes: results, pieces and failures, and the nodes that can start because of them.

Nothing here runs a model or takes a lock. What must happen outside of the engine's lock is put into Changes,
and the engine sees to it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchserve_dag.runtime.engine.request import (
    MAX_ELEMENTS,
    PENDING,
    Gather,
    Item,
    Pieces,
    Request,
    begin,
    feed,
    too_many,
)
from torchserve_dag.runtime.engine.runner import END, Piece
from torchserve_dag.runtime.graph.graph import REQUEST, Node
from torchserve_dag.runtime.messages import Failure, Skipped

FIRST_PAUSE_S = 0.05
"""Before an item's second try; before each further one twice as long, up to LONGEST_PAUSE_S."""
LONGEST_PAUSE_S = 1.0

WORTH_RETRYING = frozenset({429, 500, 502, 503, 504, 507})
"""Statuses of failures that may pass. What a sender must mend (4xx) fails again."""

FINAL = frozenset({"ModelNotFound", "Unauthorized"})
"""Types of failures of a served model that do not pass by themselves."""


@dataclass
class Changes:
    """What has happened, and has not had its effect yet."""

    ended: list[tuple[Request, str, Any]] = field(default_factory=list)
    """Nodes that have ended, with their results."""
    failed: list[tuple[Request, Failure]] = field(default_factory=list)
    """Requests that have."""
    queued: list[Item] = field(default_factory=list)
    """Items to queue."""
    later: list[tuple[float, Item]] = field(default_factory=list)
    """Items to queue after a pause, in seconds."""
    grown: list[tuple[Request, Node]] = field(default_factory=list)
    """Streaming nodes that have new pieces, or none to come."""

    def take_ended(self) -> list[tuple[Request, str, Any]]:
        ended, self.ended = self.ended, []
        return ended

    def take_grown(self) -> list[tuple[Request, Node]]:
        grown, self.grown = self.grown, []
        return grown


# Under the engine's lock.


def settle(item: Item, answer: Any, changes: Changes) -> None:
    """An item has its answer, a piece of it, or a Failure."""
    if item.node.streams:
        changes.grown.append((item.request, item.node))
    if isinstance(answer, Failure):
        _failed(item, answer, changes)
    elif isinstance(answer, Piece):
        _piece(item, answer, changes)
    else:
        _answered(item, answer, changes)


def record(request: Request, name: str, value: Any) -> list[str]:
    """A node has ended: keep its result. Which can start now, or have to look again?"""
    if request.over:
        return []
    request.values[name] = value
    ready = []
    for after in request.plan.after.get(name, ()):
        request.waits[after] -= 1
        if not request.waits[after]:
            ready.append(after)
    # A follower that has begun ends with it, or is skipped with it.
    return ready + [node.name for node in request.plan.followers.get(name, ()) if node.name in request.gathers]


def _answered(item: Item, answer: Any, changes: Changes) -> None:
    item.done = True
    if item.node.name == REQUEST:
        changes.ended.append((item.request, REQUEST, answer))
        return
    gather = item.request.gathers[item.node.name]
    if answer is END:
        gather.open = False
    else:
        item.slot[item.index] = answer
    gather.missing -= 1
    _end_complete(item.request, item.node, gather, changes)


def _piece(item: Item, piece: Piece, changes: Changes) -> None:
    """Keep it, and let the item queue for its next one."""
    item.slot.append(piece.value)
    if len(item.slot) > MAX_ELEMENTS:
        error = too_many(item.node.name, len(item.slot))
        _fail(item, Failure(error.status, error.message), changes)
        return
    item.value, item.since = piece.rest, time.monotonic()
    changes.queued.append(item)


def _failed(item: Item, failure: Failure, changes: Changes) -> None:
    """What the node's policy makes of a failure."""
    policy, final = item.node.policy, item.code is item.node.policy.fallback or item.code.yields
    pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**item.tries)
    in_time = time.monotonic() + pause < item.request.root.deadline
    if final or (policy.on_error == "fail" and not policy.retries):
        _fail(item, failure, changes)
    elif item.tries < policy.retries and in_time and failure.status in WORTH_RETRYING and failure.type not in FINAL:
        item.done = True
        changes.later.append((pause, item.again()))
    elif policy.on_error == "skip":
        item.station.counts.skipped += 1
        _answered(item, Skipped(item.node.name), changes)
    elif policy.on_error == "default":
        _answered(item, policy.default, changes)
    elif policy.fallback is None:
        _fail(item, failure, changes)
    elif isinstance(item.stand_in, Skipped):
        _answered(item, item.stand_in, changes)
    else:
        item.done = True
        changes.queued.append(item.fallen_back(policy.fallback))


def _fail(item: Item, failure: Failure, changes: Changes) -> None:
    item.done = True
    # A body that cannot be decoded is no node's; and what is inside a workflow inside names its own node.
    node = failure.node or (None if item.node.name == REQUEST else item.station.name)
    changes.failed.append((item.request, Failure(failure.status, failure.message, failure.type, node)))


def _end_complete(request: Request, node: Node, gather: Gather, changes: Changes) -> None:
    """End a node whose last answer has come."""
    if gather.complete():
        result = gather.answers if node.each or node.streams else gather.answers[0]
        changes.ended.append((request, node.name, result))


# In three steps, of which the middle one, without the lock, evaluates the expressions of the workflow's file. What
# a ready node reads no longer changes.


def values_of(request: Request, node: Node) -> tuple[Mapping[str, Any], list[tuple[int, Any]]]:
    """What a ready node reads; and of one that follows, the pieces that are new, each with its place."""
    if not node.follows or request.over:
        return request.values, []
    gather = request.gathers.setdefault(node.name, Gather([], open=True))
    _show(request, node, gather)
    source = request.gathers.get(node.follows)
    new = source.ready_from(gather.fed) if source else []
    gather.fed += len(new)
    gather.answers += [PENDING] * len(new)
    gather.missing += len(new)
    return request.values, new


Made = tuple[Gather | None, list[Item], Any]
"""A node's gather and items; or no gather, and its result."""


def make(request: Request, node: Node, values: Mapping[str, Any], new: list[tuple[int, Any]]) -> Made:
    """Raises InputError for too many elements, and whatever an expression raises."""
    if not node.follows:
        return begin(request, node, values)
    gather = request.gathers.get(node.name)
    return (gather, feed(request, node, values, gather, new), None) if gather else (None, [], None)


def start(request: Request, node: Node, made: Made, new: int, changes: Changes) -> None:
    """Queue a node's items, or end it; `new` is how many pieces of the node that it follows they were made of."""
    gather, items, result = made
    if request.over:
        return
    counts = request.plan.stations[node.code.name].counts
    if gather is None:
        counts.skipped += 1
        changes.ended.append((request, node.name, result))
        return
    if node.follows:
        source = request.gathers.get(node.follows)
        gather.missing -= new - len(items)
        counts.skipped += new - len(items)
        value = request.values.get(node.follows)
        if isinstance(value, Skipped) and not gather.ended:
            gather.ended = True  # and stays open: what follows this one is skipped likewise, when that is recorded
            changes.ended.append((request, node.name, value))
        elif source is not None:
            gather.open = gather.open and (source.open or gather.fed < len(source.answers))
    else:
        counts.skipped += gather.skipped
        request.gathers[node.name] = gather
        _show(request, node, gather)
    changes.queued += items
    _end_complete(request, node, gather, changes)


def _show(request: Request, node: Node, gather: Gather) -> None:
    """The client sees a streaming answer's pieces."""
    if node.name == request.plan.streaming and request.on_piece and request.pieces is None:
        request.pieces = Pieces(gather)
