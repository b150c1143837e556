"""The outcome of an item: its answer, chunk or failure, and what follows from it: a result, a retry, the next nodes.

Nothing here runs a model or takes a lock. What must be done without the engine's lock is recorded in Changes, which
the engine carries out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torchserve_dag.runtime.engine.circuit import OPEN
from torchserve_dag.runtime.engine.conditions import NOTHING, Consequence
from torchserve_dag.runtime.engine.fan_out import MAX_ELEMENTS, too_many
from torchserve_dag.runtime.engine.gather import PENDING, Gather
from torchserve_dag.runtime.engine.request import Item, Request
from torchserve_dag.runtime.engine.runner import END, Cancel, Chunk, Waits
from torchserve_dag.runtime.graph.graph import REQUEST, Code, Node
from torchserve_dag.runtime.messages import Failure, Skipped, Usage

FIRST_PAUSE_S = 0.05
"""Pause before an item's first retry; it doubles with each retry, up to LONGEST_PAUSE_S."""
LONGEST_PAUSE_S = 1.0

WORTH_RETRYING = frozenset({429, 500, 502, 503, 504, 507})
"""Statuses of failures that may be transient. A 4xx would fail again: the sender has to mend the request."""

FINAL = frozenset({OPEN, "ModelNotFound", "Unauthorized", "WrongType"})
"""Types of failures that are not transient, whatever their status."""


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
    cancels: list[Cancel] = field(default_factory=list)
    """What ends items that run elsewhere."""
    dropped: list[Any] = field(default_factory=list)
    """What nobody needs any more, kept until the lock is released: its end may run the `finally` of a user's
    generator."""

    def take_ended(self) -> list[tuple[Request, str, Any]]:
        ended, self.ended = self.ended, []
        return ended

    def take_streamed(self) -> list[tuple[Request, Node]]:
        streamed, self.streamed = self.streamed, []
        return streamed


# Under the engine's lock.


def record_answer(item: Item, answer: Any, changes: Changes, then: Consequence | Failure = NOTHING) -> None:
    """Record an item's answer, its next chunk, or its Failure, and what it decides."""
    streams = item.node.streams
    if streams:
        if isinstance(answer, Waits):
            _wait(item, answer, changes)
            return
        changes.streamed.append((item.request, item.node))
        if item.request.idle_s:
            item.request.deadline = max(item.request.deadline, time.monotonic() + item.request.idle_s)
    if item.code.kind.is_model:
        _count_usage(item, answer.value if isinstance(answer, Chunk) else answer)
    if then is not NOTHING and _decided(item, answer, changes, then):
        pass
    elif isinstance(answer, Failure):
        _failed(item, answer, changes, then)
    elif isinstance(answer, Chunk):
        _add_chunk(item, answer, changes)
    else:
        _answered(item, answer, changes)
    if streams:
        wake_readers(item.request, item.node.name, changes)


def record_result(request: Request, name: str, value: Any, changes: Changes) -> list[str]:
    """Record the result of a node. Returns the nodes that can start now, and the started followers of the node."""
    if request.obsolete:
        return []
    request.values[name] = value
    if request.plan.readers:
        wake_readers(request, name, changes)
    ready = []
    for after in request.plan.after.get(name, ()):
        request.waits[after] -= 1
        if not request.waits[after]:
            ready.append(after)
    # Followers have to look again: they end, or are skipped, with the node that they follow.
    return ready + [node.name for node in request.plan.followers.get(name, ()) if node.name in request.gathers]


def end_early(request: Request, node: Node, gather: Gather, changes: Changes) -> None:
    """End a node that has started: a stream with the chunks that it has, any other with Skipped where answers miss."""
    if gather.ended:
        return
    if node.streams:
        present = next((i for i, answer in enumerate(gather.answers) if answer is PENDING), len(gather.answers))
        changes.dropped.append(gather.answers)  # what still runs may write into it
        gather.answers = gather.answers[:present]
        changes.streamed.append((request, node))
    else:
        _skip_pending(gather.answers, Skipped(node.name))
    running = [item for item in request.elsewhere if item.node is node]
    changes.cancels += [request.elsewhere.pop(item) for item in running]
    changes.dropped.append(request.waiting.pop(node.name, None))
    gather.pending, gather.open = 0, False
    end_if_complete(request, node, gather, changes)


def end_if_complete(request: Request, node: Node, gather: Gather, changes: Changes) -> None:
    """End a node whose answers are all there."""
    if gather.complete():
        result = gather.answers if node.each or node.streams else gather.answers[0]
        changes.ended.append((request, node.name, result))


def _skip_pending(answers: list[Any], skipped: Skipped) -> None:
    for i, answer in enumerate(answers):
        if answer is PENDING:
            answers[i] = skipped
        elif isinstance(answer, list):
            _skip_pending(answer, skipped)


def _decided(item: Item, answer: Any, changes: Changes, then: Consequence | Failure) -> bool:
    """Carry out what an answer decides. Returns whether nothing else follows from it."""
    if isinstance(then, Failure):
        _fail(item, then, changes)
        return True
    if isinstance(answer, Failure):  # its default decides, once its attempts are over
        return False
    _stop(item.request, then.stops, changes)
    if then.again:
        item.settled = True
        changes.queued.append(item.again(answer))
    return then.again


def _stop(request: Request, names: Iterable[str], changes: Changes) -> None:
    """End nodes early. One that has not started ends when it starts."""
    for name in names:
        node = request.plan.nodes.get(name)  # none where the client asked for outputs that do not need it
        if node is None or name in request.values or name in request.stopped:
            continue
        request.stopped.add(name)
        if gather := request.gathers.get(name):
            end_early(request, node, gather, changes)


def _wait(item: Item, waits: Waits, changes: Changes) -> None:
    """Keep an item until its source has another chunk."""
    item.value = waits.stream
    item.request.waiting[item.node.name] = item, waits.source
    _wake(item.request, item.node.name, changes)


def wake_readers(request: Request, name: str, changes: Changes) -> None:
    for reader in request.plan.readers.get(name, ()):
        _wake(request, reader, changes)


def _wake(request: Request, name: str, changes: Changes) -> None:
    """Queue the item of a node that waits for a chunk, if there is one now."""
    item, source = request.waiting.get(name, (None, None))
    if item is not None and source is not None and source.ready:
        del request.waiting[name]
        item.since = time.monotonic()
        changes.queued.append(item)


def _count_usage(item: Item, answer: Any) -> None:
    usage = getattr(answer, "usage", None)
    if isinstance(usage, Usage):
        root, counts = item.request.root, item.station.counts
        root.usage += usage
        counts.usage += usage


def _answered(item: Item, answer: Any, changes: Changes) -> None:
    item.settled = True
    if item.node.name == REQUEST:
        changes.ended.append((item.request, REQUEST, answer))
        return
    gather = item.request.gathers[item.node.name]
    if answer is END:
        gather.open = False
    elif item.node.code.yields:  # a fallback that does not: its answer is a single chunk
        item.answers.append(answer)
        gather.open = False
    else:
        item.answers[item.index] = answer
    gather.pending -= 1
    end_if_complete(item.request, item.node, gather, changes)


def _add_chunk(item: Item, chunk: Chunk, changes: Changes) -> None:
    """Keep a chunk, and queue the item again for the next, unless that comes by itself.

    Where the client takes the chunks one by one, the item waits instead until there is room for the next.
    """
    item.answers.append(chunk.value)
    bounded = not item.code.kind.continuous  # an engine has a limit of its own
    if bounded and len(item.answers) > MAX_ELEMENTS + (_taken(item) if item.code.feeds else 0):
        error = too_many(item.node.name, len(item.answers))
        _fail(item, Failure(error.status, error.message), changes)
        return
    if not chunk.stream:
        return
    item.value = chunk.stream
    if item.request.stream and item.node.name in item.request.plan.way:
        item.request.stream.wait(item)
    else:
        item.since = time.monotonic()
        changes.queued.append(item)


def _taken(item: Item) -> int:
    """How many chunks the sources of a function over chunks have given."""
    gathers = item.request.gathers
    return sum(len(gathers[name].answers) for name in item.code.feeds.values() if name in gathers)


def _failed(item: Item, failure: Failure, changes: Changes, then: Consequence | Failure) -> None:
    """Apply the node's policy: retry, skip, default, fallback, or fail the request."""
    changes.dropped.append(item.request.waiting.pop(item.node.name, None))
    policy = item.node.policy
    begun = item.node.code.yields and bool(item.answers)  # chunks may be with the client already
    pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**item.failed_attempts)
    in_time = time.monotonic() + pause < item.request.root.deadline
    transient = failure.status in WORTH_RETRYING and failure.type not in FINAL
    if begun:
        _fail(item, failure, changes)
    elif item.failed_attempts < item.code.attempts.retries and in_time and transient:
        item.settled = True
        changes.retries.append((pause, item.retry()))
    elif policy.on_error == "skip":
        item.station.counts.skipped += 1
        _answered(item, Skipped(item.node.name), changes)
    elif policy.on_error == "default":
        _answered(item, policy.default, changes)
        if isinstance(then, Consequence):
            _stop(item.request, then.stops, changes)
    elif item.step == len(policy.fallbacks) or not _stands_in(policy.fallbacks[item.step], failure):
        _fail(item, failure, changes)
    elif isinstance(item.fallback_values[item.step], Skipped):
        _answered(item, item.fallback_values[item.step], changes)
    else:
        item.settled = True
        changes.queued.append(item.fall_back())


def _stands_in(fallback: Code, failure: Failure) -> bool:
    """Whether a fallback runs after this failure of the code before it."""
    return fallback.attempts.after == "any" or failure.status in WORTH_RETRYING


def _fail(item: Item, failure: Failure, changes: Changes) -> None:
    item.settled = True
    # A body that cannot be decoded belongs to no node; a failure in a sub-workflow names its node already.
    node = failure.node or (None if item.node.name == REQUEST else item.station.name)
    changes.failed.append((item.request, replace(failure, node=node)))
