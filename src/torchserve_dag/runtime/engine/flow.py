"""The effects of an answer: results, chunks and failures, and the nodes that can start because of them.

Nothing here runs a model or takes a lock. What must be done without the engine's lock is recorded in Changes, which
the engine carries out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchserve_dag.runtime.engine.fan_out import MAX_ELEMENTS, fan_out, follow, too_many
from torchserve_dag.runtime.engine.gather import PENDING, Gather
from torchserve_dag.runtime.engine.request import Item, Request
from torchserve_dag.runtime.engine.runner import END, Chunk
from torchserve_dag.runtime.graph.graph import REQUEST, Node
from torchserve_dag.runtime.messages import Failure, Skipped

FIRST_PAUSE_S = 0.05
"""Pause before an item's first retry; it doubles with each retry, up to LONGEST_PAUSE_S."""
LONGEST_PAUSE_S = 1.0

WORTH_RETRYING = frozenset({429, 500, 502, 503, 504, 507})
"""Statuses of failures that may be transient. A 4xx would fail again: the sender has to mend the request."""

FINAL = frozenset({"ModelNotFound", "Unauthorized"})
"""Types of failures of a served model that are not transient, whatever their status."""


@dataclass
class Changes:
    """Events whose effects are still to be carried out."""

    ended: list[tuple[Request, str, Any]] = field(default_factory=list)
    """Nodes that have ended, with their results."""
    failed: list[tuple[Request, Failure]] = field(default_factory=list)
    """Requests to end with a failure."""
    queued: list[Item] = field(default_factory=list)
    """Items to queue."""
    retries: list[tuple[float, Item]] = field(default_factory=list)
    """Items to queue after a pause, in seconds."""
    streamed: list[tuple[Request, Node]] = field(default_factory=list)
    """Streaming nodes with new chunks, or at their end."""

    def take_ended(self) -> list[tuple[Request, str, Any]]:
        ended, self.ended = self.ended, []
        return ended

    def take_streamed(self) -> list[tuple[Request, Node]]:
        streamed, self.streamed = self.streamed, []
        return streamed


# Under the engine's lock.


def settle(item: Item, answer: Any, changes: Changes) -> None:
    """Record an item's answer, its next chunk, or its Failure."""
    if item.node.streams:
        changes.streamed.append((item.request, item.node))
    if isinstance(answer, Failure):
        _failed(item, answer, changes)
    elif isinstance(answer, Chunk):
        _add_chunk(item, answer, changes)
    else:
        _answered(item, answer, changes)


def record_result(request: Request, name: str, value: Any) -> list[str]:
    """Record the result of a node. Returns the nodes that can start now, and the started followers of the node."""
    if request.finished:
        return []
    request.values[name] = value
    ready = []
    for after in request.plan.after.get(name, ()):
        request.waits[after] -= 1
        if not request.waits[after]:
            ready.append(after)
    # Followers have to look again: they end, or are skipped, with the node that they follow.
    return ready + [node.name for node in request.plan.followers.get(name, ()) if node.name in request.gathers]


def _answered(item: Item, answer: Any, changes: Changes) -> None:
    item.ended = True
    if item.node.name == REQUEST:
        changes.ended.append((item.request, REQUEST, answer))
        return
    gather = item.request.gathers[item.node.name]
    if answer is END:
        gather.open = False
    else:
        item.answers[item.index] = answer
    gather.pending -= 1
    _end_if_complete(item.request, item.node, gather, changes)


def _add_chunk(item: Item, chunk: Chunk, changes: Changes) -> None:
    """Keep a chunk, and queue the item again for the next."""
    item.answers.append(chunk.value)
    if len(item.answers) > MAX_ELEMENTS:
        error = too_many(item.node.name, len(item.answers))
        _fail(item, Failure(error.status, error.message), changes)
        return
    item.value, item.since = chunk.stream, time.monotonic()
    changes.queued.append(item)


def _failed(item: Item, failure: Failure, changes: Changes) -> None:
    """Apply the node's policy: retry, skip, default, fallback, or fail the request."""
    policy, final = item.node.policy, item.code is item.node.policy.fallback or item.code.yields
    pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**item.failed_attempts)
    in_time = time.monotonic() + pause < item.request.root.deadline
    transient = failure.status in WORTH_RETRYING and failure.type not in FINAL
    if final or (policy.on_error == "fail" and not policy.retries):
        _fail(item, failure, changes)
    elif item.failed_attempts < policy.retries and in_time and transient:
        item.ended = True
        changes.retries.append((pause, item.retry()))
    elif policy.on_error == "skip":
        item.station.counts.skipped += 1
        _answered(item, Skipped(item.node.name), changes)
    elif policy.on_error == "default":
        _answered(item, policy.default, changes)
    elif policy.fallback is None:
        _fail(item, failure, changes)
    elif isinstance(item.fallback_value, Skipped):
        _answered(item, item.fallback_value, changes)
    else:
        item.ended = True
        changes.queued.append(item.fall_back(policy.fallback))


def _fail(item: Item, failure: Failure, changes: Changes) -> None:
    item.ended = True
    # A body that cannot be decoded belongs to no node; a failure in a sub-workflow names its node already.
    node = failure.node or (None if item.node.name == REQUEST else item.station.name)
    changes.failed.append((item.request, Failure(failure.status, failure.message, failure.type, node)))


def _end_if_complete(request: Request, node: Node, gather: Gather, changes: Changes) -> None:
    if gather.complete():
        result = gather.answers if node.each or node.streams else gather.answers[0]
        changes.ended.append((request, node.name, result))


# A ready node starts in three steps: `read_inputs` and `start_node` under the lock, and between them, without it,
# `make_items`, which evaluates the expressions of the workflow's file. What a ready node reads no longer changes.


def read_inputs(request: Request, node: Node) -> tuple[Mapping[str, Any], list[tuple[int, Any]]]:
    """The values that a ready node reads; for a node that follows a stream, also the new chunks with their indices."""
    if not node.follows or request.finished:
        return request.values, []
    gather = request.gathers.setdefault(node.name, Gather([], open=True))
    _stream_to_client(request, node, gather)
    source = request.gathers.get(node.follows)
    chunks = source.ready_from(gather.consumed) if source else []
    gather.consumed += len(chunks)
    gather.answers += [PENDING] * len(chunks)
    gather.pending += len(chunks)
    return request.values, chunks


Made = tuple[Gather | None, list[Item], Any]
"""A node's gather and items; for a skipped node None, no items, and the Skipped."""


def make_items(request: Request, node: Node, values: Mapping[str, Any], chunks: list[tuple[int, Any]]) -> Made:
    """Raises InputError for too many elements, and whatever an expression raises."""
    if not node.follows:
        return fan_out(request, node, values)
    gather = request.gathers.get(node.name)
    return (gather, follow(request, node, values, gather, chunks), None) if gather else (None, [], None)


def start_node(request: Request, node: Node, made: Made, chunks: int, changes: Changes) -> None:
    """Queue a node's items, or end the node; `chunks` is the number of followed chunks that `made` was made from."""
    gather, items, result = made
    if request.finished:
        return
    counts = request.plan.stations[node.code.name].counts
    if gather is None:
        counts.skipped += 1
        changes.ended.append((request, node.name, result))
        return
    if node.follows:
        source = request.gathers.get(node.follows)
        gather.pending -= chunks - len(items)
        counts.skipped += chunks - len(items)
        value = request.values.get(node.follows)
        if isinstance(value, Skipped) and not gather.ended:
            gather.ended = (
                True  # `gather` stays open, so that recording this result skips the node's own followers in turn
            )
            changes.ended.append((request, node.name, value))
        elif source is not None:
            gather.open = gather.open and (source.open or gather.consumed < len(source.answers))
    else:
        counts.skipped += gather.skipped
        request.gathers[node.name] = gather
        _stream_to_client(request, node, gather)
    changes.queued += items
    _end_if_complete(request, node, gather, changes)


def _stream_to_client(request: Request, node: Node, gather: Gather) -> None:
    """Connect a node's chunks to the client, if the answer consists of them."""
    if request.stream is not None and node.name == request.plan.streaming:
        request.stream.open(gather)
