"""The start of a ready node, in three steps: read its inputs, make its items, queue them.

`read_inputs` and `start_node` run under the engine's lock; between them, without the lock, `make_items` evaluates the
expressions of the workflow's file. That is safe because the values that a ready node reads no longer change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchserve_dag.runtime.engine.fan_out import fan_out, follow
from torchserve_dag.runtime.engine.gather import PENDING, Gather
from torchserve_dag.runtime.engine.outcome import Changes, end_early, end_if_complete, wake_readers
from torchserve_dag.runtime.engine.request import Item, Request
from torchserve_dag.runtime.graph.graph import Node
from torchserve_dag.runtime.messages import Skipped

Made = tuple[Gather | None, list[Item], Any]
"""A node's gather and items; for a skipped node None, no items, and the Skipped."""


def read_inputs(request: Request, node: Node) -> tuple[Mapping[str, Any], list[Any], list[tuple[int, Any]]]:
    """The values that a ready node reads; for a node that follows a stream, also the list that its answers are written
    into, and the new chunks with their indices in it.
    """
    if not node.follows or request.obsolete:
        return request.values, [], []
    gather = request.gathers.setdefault(node.name, Gather([], open=True))
    _stream_to_client(request, node, gather)
    source = request.gathers.get(node.follows)
    chunks = source.ready_from(gather.consumed) if source and not gather.ended else []
    gather.consumed += len(chunks)
    gather.answers += [PENDING] * len(chunks)
    gather.pending += len(chunks)
    return request.values, gather.answers, chunks


def make_items(
    request: Request, node: Node, values: Mapping[str, Any], answers: list[Any], chunks: list[tuple[int, Any]]
) -> Made:
    """Raises InputError for too many elements, and whatever an expression raises."""
    if not node.follows:
        return fan_out(request, node, values)
    gather = request.gathers.get(node.name)
    return (gather, follow(request, node, values, answers, chunks), None) if gather else (None, [], None)


def start_node(request: Request, node: Node, made: Made, chunks: int, changes: Changes) -> None:
    """Queue a node's items, or end the node; `chunks` is the number of followed chunks that `made` was made from."""
    gather, items, result = made
    if request.obsolete:
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
        if len(items) < chunks:  # the skipped ones are answers, which others take
            changes.streamed.append((request, node))
            wake_readers(request, node.name, changes)
        value = request.values.get(node.follows)
        if isinstance(value, Skipped) and not gather.ended:
            # `gather` stays open, so that recording this result skips the node's own followers in turn.
            gather.ended = True
            changes.ended.append((request, node.name, value))
        elif source is not None:
            gather.open = gather.open and (source.open or gather.consumed < len(source.answers))
    else:
        counts.skipped += gather.skipped
        request.gathers[node.name] = gather
        _stream_to_client(request, node, gather)
    if node.name in request.stopped:
        end_early(request, node, gather, changes)
        return
    changes.queued += items
    end_if_complete(request, node, gather, changes)


def _stream_to_client(request: Request, node: Node, gather: Gather) -> None:
    """Have a node's chunks pass on, if they are on their way to the client, and reach the client, if it is the last."""
    if request.stream is None:
        return
    gather.passing = node.name in request.plan.way
    if node.name == request.plan.streaming:
        request.stream.open(gather)
