"""A node's code at work: its queue, what runs it, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torchserve_dag.runtime.data.options import Priority
from torchserve_dag.runtime.engine.counts import NodeCounts
from torchserve_dag.runtime.engine.queue import FairQueue
from torchserve_dag.runtime.engine.request import Item
from torchserve_dag.runtime.engine.runner import Runner

CPU, ELSEWHERE = "cpu", "elsewhere"

BUNDLE_S = 0.001
"""Functions run one item at a time, and taking each from the queue costs more than many of them do. So a lane takes
as many as lately ran in this time."""

MOST_BUNDLED = 64

StartItem = Callable[[Item], None]
"""Starts one item that runs elsewhere, and does not block."""


def _nothing(_: Any) -> Any:
    raise TypeError("this code runs otherwise")


class Station:
    """Items wait here for one code: a handler, a function, a served model, a workflow inside."""

    def __init__(
        self,
        name: str,
        *,
        batch: int,
        bundle: bool = False,
        depth: tuple[int, ...],
        runner: Runner | None = None,
        device: str = CPU,
        start: StartItem | None = None,
        dropped: list[Item],
    ) -> None:
        """`dropped`: see queue.py."""
        self.name = name
        self.batch = batch
        """Of what runs elsewhere: how many items may be under way."""
        self.bundle = bundle
        """Whether its items, which do not share a call, may be taken several at a time: see lanes.py."""
        self.depth = depth
        """How far from the request; see lanes.py."""
        self.runner = runner or _nothing
        self.device = device if start is None else ELSEWHERE
        self.start = start or _nothing
        self.one_at_a_time: bool = getattr(runner, "one_at_a_time", False)
        self.under_way = 0
        """Batches in lanes, or items elsewhere."""
        self.turn = 0
        """Of what runs in lanes: at which of their turns its last batch was taken; of the rest: its turns so far."""
        self.item_s = 0.0
        """How long one of its items ran lately; 0 before the first."""
        self._interactive, self._bulk = FairQueue(dropped), FairQueue(dropped)
        self.queues: dict[Priority, FairQueue] = {"interactive": self._interactive, "bulk": self._bulk}
        self.counts = NodeCounts()

    @property
    def size(self) -> int:
        """The most items that a lane takes at a time."""
        if not self.bundle:
            return self.batch
        return max(1, min(MOST_BUNDLED, int(BUNDLE_S / self.item_s))) if self.item_s else 1

    def ran(self, items: int, run_s: float) -> None:
        """Items ran together for so long."""
        self.item_s += (run_s / items - self.item_s) * (0.2 if self.item_s else 1)

    def __len__(self) -> int:
        """How many items wait."""
        return len(self._interactive.heap) + len(self._bulk.heap)

    def put(self, items: Iterable[Item]) -> None:
        for item in items:
            self.queues[item.request.root.options.priority].put(item)

    def head(self, priority: Priority) -> Item | None:
        return self.queues[priority].head()

    def take(self, most: int, first: Priority = "interactive") -> list[Item]:
        """The next items, at most `most`: those of the priority `first`, and then the others."""
        then: Priority = "bulk" if first == "interactive" else "interactive"
        items = self.queues[first].take(most)
        return items + self.queues[then].take(most - len(items)) if len(items) < most else items

    def drop_ended(self) -> None:
        for queue in self.queues.values():
            queue.drop_ended()


def shallow_first(stations: Iterable[Station]) -> list[Station]:
    return sorted(stations, key=lambda station: station.depth)
