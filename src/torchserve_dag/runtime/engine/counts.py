"""A node's counters: waits, run times, batch sizes, failures, skipped items."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets of durations; the last bucket has none."""
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


@dataclass
class Histogram:
    """Counts by bucket, like a Prometheus histogram, but not cumulative."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def copy(self) -> Histogram:
        return Histogram(self.bounds, list(self.counts), self.sum)


@dataclass
class NodeCounts:
    queue_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """For each item: seconds in the queue, until a batch took it."""
    run_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """For each batch: seconds of its run."""
    batch: Histogram = field(default_factory=lambda: Histogram(SIZES))
    """For each batch: its number of items."""
    failures: int = 0
    """Failed attempts; an item that is retried may still succeed."""
    skipped: int = 0
    """Items skipped by a `when`, a skipped input or `on_error: skip`."""

    @property
    def batches(self) -> int:
        return self.batch.count

    @property
    def items(self) -> int:
        return self.queue_s.count

    def record_batch(self, waits_s: Iterable[float], run_s: float, failures: int) -> None:
        """A batch has run: the wait of each of its items, its run time, and how many of its items failed."""
        size = 0
        for wait in waits_s:
            self.queue_s.observe(wait)
            size += 1
        self.run_s.observe(run_s)
        self.batch.observe(size)
        self.failures += failures

    def copy(self) -> NodeCounts:
        return NodeCounts(self.queue_s.copy(), self.run_s.copy(), self.batch.copy(), self.failures, self.skipped)
