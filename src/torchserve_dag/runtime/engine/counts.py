"""A node's counters: waits, run times, batch sizes, failures, skipped items."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torchserve_dag.runtime.messages import Usage

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets of durations; the last bucket has none."""
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
"""Likewise, of the time for a token."""
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


class Chunked(Protocol):
    """An item whose chunks come by themselves."""

    since: float
    first_chunk: float


@dataclass
class NodeCounts:
    queue_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """For each item: seconds in the queue, until a batch took it."""
    run_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """For each batch: seconds of its run."""
    batch: Histogram = field(default_factory=lambda: Histogram(SIZES))
    """For each batch: its number of items."""
    first_chunk_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """Of a model with an engine of its own, for each answer: seconds until its first chunk, its wait included."""
    token_s: Histogram = field(default_factory=lambda: Histogram(TOKEN_SECONDS))
    """Likewise: seconds for each token after the first."""
    usage: Usage = field(default_factory=Usage)
    """The tokens that a model's answers have named."""
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

    def record_chunk(self, item: Chunked, chunk: Any) -> None:
        """An item's chunk has come by itself; the last says how many tokens there were."""
        now = time.monotonic()
        if not item.first_chunk:
            item.first_chunk = now
            self.first_chunk_s.observe(now - item.since)
        usage = getattr(chunk, "usage", None)
        if isinstance(usage, Usage) and usage.completion_tokens > 1:
            self.token_s.observe((now - item.first_chunk) / (usage.completion_tokens - 1))

    def copy(self) -> NodeCounts:
        return replace(
            self,
            queue_s=self.queue_s.copy(),
            run_s=self.run_s.copy(),
            batch=self.batch.copy(),
            first_chunk_s=self.first_chunk_s.copy(),
            token_s=self.token_s.copy(),
        )
