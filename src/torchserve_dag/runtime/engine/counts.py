"""A node's counters: waits, run times, batch sizes, failures, skipped items."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torchserve_dag.runtime.messages import Chat, TextChunk, Usage

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets of durations; the last bucket has none."""
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

# As OpenTelemetry's conventions for generative AI say: github.com/open-telemetry/semantic-conventions-genai.
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
ANSWER_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKENS = tuple(float(4**power) for power in range(14))
WORKFLOW_S = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 102.4, 204.8, 409.6)

OPERATIONS = ("chat", "text_completion")
"""What a model with an engine of its own is asked for, in OpenTelemetry's words."""


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


@dataclass(slots=True)
class Written:
    """What is known of an answer whose chunks come by themselves."""

    first_token: float
    """When its first chunk came, on time.monotonic()'s clock."""
    usage: Usage | None = None
    finish_reasons: list[str] = field(default_factory=list)
    served_by: str | None = None


class Writing(Protocol):
    """An item whose chunks come by themselves."""

    value: Any
    since: float
    written: Written | None


def operation_of(value: Any) -> str:
    """What an item's value asks a language model for: one of OPERATIONS."""
    return "chat" if isinstance(value, Chat) else "text_completion"


@dataclass
class LanguageCounts:
    """The answers of a model with an engine of its own, to one operation."""

    first_token_s: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_S))
    """For each answer: seconds until its first chunk, its wait included."""
    token_s: Histogram = field(default_factory=lambda: Histogram(TOKEN_S))
    """For each answer: seconds for a token after the first, on average."""
    answer_s: Histogram = field(default_factory=lambda: Histogram(ANSWER_S))
    """For each answer that did not fail: seconds until its end, its wait included."""
    prompt_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    answer_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    cached_tokens: int = 0

    def record_chunk(self, item: Writing, chunk: Any) -> None:
        now = time.monotonic()
        if item.written is None:
            item.written = Written(now)
            self.first_token_s.observe(now - item.since)
        if not isinstance(chunk, TextChunk):
            return
        if chunk.finish_reason:
            item.written.finish_reasons.append(chunk.finish_reason)
        item.written.served_by = chunk.served_by or item.written.served_by
        if chunk.usage:
            item.written.usage = chunk.usage
            self.prompt_tokens.observe(chunk.usage.prompt_tokens)
            self.answer_tokens.observe(chunk.usage.completion_tokens)
            self.cached_tokens += chunk.usage.cached_tokens
            at_once = max(1, len(item.written.finish_reasons))  # several answers to one request grow side by side
            tokens = chunk.usage.completion_tokens / at_once
            if tokens > 1:
                self.token_s.observe((now - item.written.first_token) / (tokens - 1))

    def copy(self) -> LanguageCounts:
        return LanguageCounts(
            self.first_token_s.copy(),
            self.token_s.copy(),
            self.answer_s.copy(),
            self.prompt_tokens.copy(),
            self.answer_tokens.copy(),
            self.cached_tokens,
        )


@dataclass
class NodeCounts:
    queue_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """For each item: seconds in the queue, until a batch took it."""
    run_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """For each batch: seconds of its run."""
    batch: Histogram = field(default_factory=lambda: Histogram(SIZES))
    """For each batch: its number of items."""
    language: dict[str, LanguageCounts] = field(default_factory=dict)
    """Of a model with an engine of its own: its answers, by operation."""
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

    def record_chunk(self, item: Writing, chunk: Any) -> None:
        """An item's chunk has come by itself; the last says how many tokens there were."""
        self.language[operation_of(item.value)].record_chunk(item, chunk)

    def record_end(self, item: Writing) -> None:
        """An item whose chunks come by themselves has got the last."""
        self.language[operation_of(item.value)].answer_s.observe(time.monotonic() - item.since)

    def copy(self) -> NodeCounts:
        return replace(
            self,
            queue_s=self.queue_s.copy(),
            run_s=self.run_s.copy(),
            batch=self.batch.copy(),
            language={operation: counts.copy() for operation, counts in self.language.items()},
        )


@dataclass
class WorkflowCounts:
    """The requests of a whole workflow."""

    duration_s: Histogram = field(default_factory=lambda: Histogram(WORKFLOW_S))
    """For each request that did not fail: seconds from its arrival in the worker until its answer."""

    def copy(self) -> WorkflowCounts:
        return WorkflowCounts(self.duration_s.copy())
