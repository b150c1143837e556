"""What the answer of an item decides: another round of its node, and the nodes that it ends early."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.engine.request import Item
from torchserve_dag.runtime.engine.runner import END, Chunk, Waits, internal_error
from torchserve_dag.runtime.graph.graph import PARAMETERS
from torchserve_dag.runtime.messages import Failure, Skipped

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Consequence:
    again: bool = False
    """Whether the node runs once more, with the answer."""
    stops: tuple[str, ...] = ()
    """The nodes that end now."""


NOTHING = Consequence()


def decide_all(items: Sequence[Item], answers: Sequence[Any]) -> Sequence[Consequence | Failure]:
    """What each answer to the items of one node decides."""
    if not (items and items[0].node.decides):
        return [NOTHING] * len(items)
    return [decide(item, answer) for item, answer in zip(items, answers, strict=True)]


def decide(item: Item, answer: Any) -> Consequence | Failure:
    """What an answer decides, or a chunk, or the default that replaces a Failure. A Failure if an expression raised.

    Called without the engine's lock: the properties of users' messages are users' code.
    """
    if item.obsolete:
        return NOTHING
    policy = item.node.policy
    if isinstance(answer, Failure) and policy.on_error == "default":
        answer = policy.default
    elif isinstance(answer, Chunk):
        answer = answer.value
    if answer is END or isinstance(answer, Failure | Skipped | Waits):
        return NOTHING
    values = {item.node.name: answer, PARAMETERS: item.request.values.get(PARAMETERS, {})}
    try:
        stops = tuple(name for name, condition in item.node.stops.items() if condition.evaluate(values))
        repeat = item.node.repeat
        again = repeat is not None and item.step == 0 and item.round < repeat.most and not repeat.until.evaluate(values)
    except Exception as error:  # noqa: BLE001 (a user's object may raise anything)
        name = item.request.plan.prefix + item.node.name
        fault = logs.report(logger, error, f"request {item.request.id}: the conditions of {name} raised")
        return internal_error(name, fault)
    return Consequence(again, stops)
