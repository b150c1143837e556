"""A station: the queue of a node's code, what runs it, and where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, get_args

from torchserve_dag.runtime.data.options import Priority
from torchserve_dag.runtime.engine.circuit import Breaker
from torchserve_dag.runtime.engine.counts import OPERATIONS, LanguageCounts, NodeCounts
from torchserve_dag.runtime.engine.queue import FairQueue, ItemQueue, ItemT, TokenQueue
from torchserve_dag.runtime.engine.runner import OwnEngine, Runner
from torchserve_dag.runtime.graph.graph import Attempts

CPU, ELSEWHERE = "cpu", "elsewhere"

BUNDLE_S = 0.001
"""Functions run one item at a time, and taking an item from the queue costs more than many functions do. So a lane
takes as many items at once as should run in this time, going by recent run times."""

MAX_BUNDLE = 64

OF_OTHERS = 8
"""The items of one token leave a place of so many to others, of an own engine's room, and one at least."""

EMA_WEIGHT = 0.2
"""Weight of the newest batch in the moving average of an item's run time."""


def _not_used(_: Any) -> Any:
    raise TypeError("a station either runs batches in lanes or starts items elsewhere")


class Station(Generic[ItemT]):
    """The queue of one piece of code (a handler, a function, a served model, a sub-workflow), and how its items run."""

    def __init__(
        self,
        name: str,
        *,
        batch: int,
        bundle: bool = False,
        depth: tuple[int, ...],
        runner: Runner | None = None,
        device: str = CPU,
        start: Callable[[Sequence[ItemT]], None] | None = None,
        one_at_a_time: bool = False,
        own_engine: OwnEngine | None = None,
        attempts: Attempts | None = None,
        dropped: list[ItemT],
    ) -> None:
        """A station has a `runner`, which lanes call with batches, or `start`, which starts an item elsewhere.

        `start` does not block. With `one_at_a_time` it starts a batch, when the last batch has been answered. For
        `dropped` see FairQueue.
        """
        self.name = name
        self.batch = batch
        """The largest batch; for items that run elsewhere, the limit of items in flight."""
        self.bundle = bundle
        """Whether a lane may take several items in one turn although the code runs them one by one: see lanes.py."""
        self.depth = depth
        """The node's distance from the request; see lanes.py."""
        self.runner = runner or _not_used
        self.device = device if start is None else ELSEWHERE
        self.start = start or _not_used
        self.one_at_a_time = one_at_a_time
        self.paused = False
        """Whether lanes take nothing from here for now."""
        self.in_flight = 0
        """The number of batches that run in lanes, or of items that run elsewhere."""
        self.turn = 0
        """In lanes: the device's turn that took this station's last batch. Elsewhere: this station's turns."""
        self.item_s = 0.0
        """Moving average of the run time of one item; 0 before the first."""
        self.queues: dict[Priority, ItemQueue[ItemT]] = {
            priority: TokenQueue(dropped, self._fits) if own_engine else FairQueue(dropped)
            for priority in get_args(Priority)
        }
        """Items of an own engine take long: no token's may keep those of others waiting."""
        self.own_engine = own_engine
        self.breaker = Breaker(attempts.circuit) if attempts and attempts.circuit else None
        self.limits = bool(self.breaker or (attempts and (attempts.timeout_s or attempts.first_chunk_s)))
        """Whether an attempt has a time limit, or may not be made."""
        self._share = max(1, batch - max(1, batch // OF_OTHERS))
        self._of_token: Counter[str] = Counter()
        """Of an own engine's items in flight: how many belong to each token."""
        self.counts = NodeCounts(language={name: LanguageCounts() for name in OPERATIONS} if own_engine else {})

    @property
    def max_items(self) -> int:
        """The most items that a lane takes in one turn."""
        if not self.bundle:
            return self.batch
        return max(1, min(MAX_BUNDLE, int(BUNDLE_S / self.item_s))) if self.item_s else 1

    @property
    def free(self) -> int:
        """How many items may start elsewhere now."""
        if self.one_at_a_time:
            return 0 if self.in_flight else self.batch
        return self.batch - self.in_flight

    def record_run(self, items: int, run_s: float) -> None:
        """A batch of `items` ran for `run_s` seconds."""
        self.item_s += (run_s / items - self.item_s) * (EMA_WEIGHT if self.item_s else 1)

    def __len__(self) -> int:
        """How many items are queued."""
        return sum(map(len, self.queues.values()))

    def push(self, items: Iterable[ItemT]) -> None:
        for item in items:
            self.queues[item.request.root.options.priority].push(item)

    def peek(self, priority: Priority) -> ItemT | None:
        return self.queues[priority].peek()

    def take(self, most: int, first: Priority = "interactive") -> list[ItemT]:
        """Take up to `most` items: those of priority `first`, then those of the other priority."""
        other: Priority = "bulk" if first == "interactive" else "interactive"
        items = self.queues[first].take(most)
        return items + self.queues[other].take(most - len(items)) if len(items) < most else items

    def leave(self, item: ItemT) -> None:
        """An item that ran elsewhere is answered."""
        self.in_flight -= 1
        token = item.request.root.options.token
        if self.own_engine and token:
            self._of_token[token] -= 1

    def _fits(self, item: ItemT) -> bool:
        """Whether its token may have one more item in flight, which is counted then."""
        token = item.request.root.options.token
        if token and self._of_token[token] >= self._share:
            return False
        if token:
            self._of_token[token] += 1
        return True

    def drop_obsolete(self) -> None:
        for queue in self.queues.values():
            queue.drop_obsolete()


def shallow_first(stations: Iterable[Station[ItemT]]) -> list[Station[ItemT]]:
    return sorted(stations, key=lambda station: station.depth)
