"""Counts every request that ends in a load's window."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torchserve_dag.bench.answers import Answers
from torchserve_dag.bench.sender import REFUSED, Answer

_TEXT_BYTES = 300
"""How many bytes of an error's text are kept."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles of latencies, in ms."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of one load in one window."""

    seconds: float
    requests: int
    """Requests that were answered with success."""
    objects: int
    """Objects in these answers; 0 for an answer that is not JSON with `objects`, a list or a number."""
    errors: dict[str, int]
    """By HTTP status, by gRPC's status where HTTP has none, or by the reason why no answer came."""
    error_texts: dict[str, str]
    """For each kind of error, the beginning of the first text that came with it."""
    refused: int
    """The errors with which an overloaded server refuses a request: status 429 and 503."""
    different: int
    """The successful answers that differ from the first answer to the same body."""
    not_sent: int
    """Arrivals of an open loop that were not sent, because too many requests were outstanding."""
    latency_ms: Percentiles | None
    """Of the successful requests; None without any."""
    refused_ms: Percentiles | None
    late_ms: Percentiles | None
    """How much later than planned the requests of an open loop were sent; their latencies include this delay."""
    client_cpu_us: float
    """The load generator's own CPU time, per request that ended."""
    answered: int
    """All successful answers of the run, with those of the warm-up and those that came after the window."""
    objects_by_body: list[int | None]
    """The number of objects in the first answer to each body; None for a body without an answer."""


@dataclass(slots=True)
class Window:
    """Counts what ends between `begin` and `end`, and all answers of the run. Times are in seconds."""

    answers: Answers
    requests: int = 0
    objects: int = 0
    refused: int = 0
    different: int = 0
    not_sent: int = 0
    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    error_texts: dict[str, str] = field(default_factory=dict)
    _latencies: list[float] = field(default_factory=list)
    _refused: list[float] = field(default_factory=list)
    _late: list[float] = field(default_factory=list)
    _open: bool = False
    _began: float = 0.0
    _seconds: float = 0.0
    _cpu: float = 0.0

    def begin(self) -> None:
        self._open, self._began, self._cpu = True, time.perf_counter(), time.process_time()

    def end(self) -> None:
        self._open = False
        self._seconds, self._cpu = time.perf_counter() - self._began, time.process_time() - self._cpu

    def sent(self, late: float) -> None:
        if self._open:
            self._late.append(late)

    def could_not_send(self) -> None:
        if self._open:
            self.not_sent += 1

    def ended(self, body: int, latency: float, answer: Answer) -> None:
        verdict = self.answers.judge(body, answer.content) if answer.ok else None
        self.answered += answer.ok
        if not self._open:
            return
        if verdict is not None:
            self._latencies.append(latency)
            self.requests += 1
            self.objects += verdict.objects
            self.different += not verdict.same
            return
        name = answer.reason or str(int(answer.status))
        self.errors[name] += 1
        if answer.content and name not in self.error_texts:
            self.error_texts[name] = " ".join(answer.content[:_TEXT_BYTES].decode("utf-8", "replace").split())
        if answer.status in REFUSED:
            self.refused += 1
            self._refused.append(latency)

    def counts(self) -> Counts:
        ended = self.requests + self.errors.total()
        return Counts(
            seconds=self._seconds,
            requests=self.requests,
            objects=self.objects,
            errors=dict(self.errors),
            error_texts=self.error_texts,
            refused=self.refused,
            different=self.different,
            not_sent=self.not_sent,
            latency_ms=percentiles(self._latencies),
            refused_ms=percentiles(self._refused),
            late_ms=percentiles(self._late),
            client_cpu_us=1e6 * self._cpu / ended if ended else 0.0,
            answered=self.answered,
            objects_by_body=self.answers.objects(),
        )


def percentiles(seconds: Sequence[float]) -> Percentiles | None:
    """Percentiles by nearest rank, in ms, of times in seconds."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    p50, p95, p99 = (1e3 * ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95, 0.99))
    return Percentiles(p50, p95, p99)
