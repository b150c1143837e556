"""What is counted while a load runs: every request that ends in the window."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torchserve_dag.bench.answers import Answers
from torchserve_dag.bench.sender import REFUSED, Answer

_SAID = 300
"""How many bytes of an error are kept."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of latencies, in ms."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Counts:
    """What one load of one window came to."""

    seconds: float
    requests: int
    """Answered with success."""
    objects: int
    """In their answers; 0 where these are not JSON with `objects`, a list or a number."""
    errors: dict[str, int]
    """By HTTP status, by gRPC's own name where it stands for none, or by what went wrong before any answer."""
    said: dict[str, str]
    """What came with the first of each, where something did; its beginning."""
    refused: int
    """Of the errors, those with which a server says that it has too much to do: status 429 and 503."""
    different: int
    """Of the successes, those that are not as the first answer to the same body."""
    not_sent: int
    """Arrivals of an open loop for which too many requests were out already."""
    latency_ms: Percentiles | None
    """Of the successes; None where there were none."""
    refused_ms: Percentiles | None
    late_ms: Percentiles | None
    """How much later than planned the requests of an open loop were sent. Their latencies hold it."""
    client_cpu_us: float
    """The load generator's own CPU time, per request that ended."""
    answered: int
    """Every answer of the run with success, of the warm-up too and of what was still out when the window closed."""
    found: list[int | None]
    """How many objects the first answer to each body has; None where none came."""


@dataclass(slots=True)
class Window:
    """Open from `begin` to `end`; it goes on noting how many answers come in all. Times are in seconds."""

    answers: Answers
    requests: int = 0
    objects: int = 0
    refused: int = 0
    different: int = 0
    not_sent: int = 0
    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    said: dict[str, str] = field(default_factory=dict)
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
        seen = self.answers.see(body, answer.content) if answer.ok else None
        self.answered += answer.ok
        if not self._open:
            return
        if seen is not None:
            self._latencies.append(latency)
            self.requests += 1
            self.objects += seen.objects
            self.different += not seen.same
            return
        name = answer.reason or str(int(answer.status))
        self.errors[name] += 1
        if answer.content and name not in self.said:
            self.said[name] = " ".join(answer.content[:_SAID].decode("utf-8", "replace").split())
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
            said=self.said,
            refused=self.refused,
            different=self.different,
            not_sent=self.not_sent,
            latency_ms=percentiles(self._latencies),
            refused_ms=percentiles(self._refused),
            late_ms=percentiles(self._late),
            client_cpu_us=1e6 * self._cpu / ended if ended else 0.0,
            answered=self.answered,
            found=self.answers.objects(),
        )


def percentiles(seconds: Sequence[float]) -> Percentiles | None:
    """The nearest ranks, in ms, of times in seconds."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    p50, p95, p99 = (1e3 * ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95, 0.99))
    return Percentiles(p50, p95, p99)
