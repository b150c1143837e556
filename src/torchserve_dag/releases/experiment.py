"""The result of an A/B test so far: differences, their confidence intervals, and how many requests are still needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles, stdev

from torchserve_dag.releases import intervals
from torchserve_dag.releases.intervals import Interval
from torchserve_dag.releases.request_log import LoggedRequest


@dataclass(frozen=True, slots=True)
class Arm:
    """The requests of one version."""

    version: str
    requests: int
    errors: int
    fell_back: int
    left: int
    """Requests that clients gave up: they disconnected, or chose a shorter deadline."""
    p50_ms: float
    p99_ms: float
    score: float | None
    """The mean score that the workflow gave its answers."""
    feedback: float | None
    """The mean score that clients posted to /feedback."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The second version minus the first, in one measure."""

    what: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    """The bounds of the 95 % confidence interval."""
    of: tuple[int, int]
    """How many requests of each version have this measure."""
    needed: int | None
    """How many more requests of this model, or items of a data set, settle the difference; 0 if it is settled; None
    without a difference."""

    @classmethod
    def between(
        cls, what: str, values: Sequence[float], interval: Interval, sizes: tuple[int, int], spread: float, whole: int
    ) -> Difference:
        """`spread` is the variance of the difference, times `whole`: how many observations there are."""
        difference, (low, high) = values[1] - values[0], interval
        needed: int | None = None
        if not low <= 0 <= high:
            needed = 0
        elif difference:
            needed = max(0, math.ceil(intervals.needed(difference, spread) - whole)) or 1
        return cls(what, values[0], values[1], difference, low, high, sizes, needed)

    @property
    def settled(self) -> bool:
        return not self.low <= 0 <= self.high


@dataclass(frozen=True, slots=True)
class Result:
    model: str
    arms: list[Arm]
    compared: tuple[str, ...]
    """The two versions with the most requests; empty if only one had requests."""
    differences: list[Difference]
    """Between the compared versions: errors, duration, and scores and feedback if there are any."""


def compare(model: str, requests: Sequence[LoggedRequest]) -> Result:
    """Compare the versions of a model by their requests."""
    versions = list(dict.fromkeys(one.version for one in requests))
    parts = {version: [one for one in requests if one.version == version] for version in versions}
    arms = [_arm(version, part) for version, part in sorted(parts.items())]
    if len(arms) < 2:  # noqa: PLR2004
        return Result(model, arms, (), [])
    most = sorted(arms, key=lambda arm: -arm.requests)[:2]
    compared = tuple(sorted(arm.version for arm in most))
    first, second = (parts[version] for version in compared)
    whole = len(first) + len(second)
    answered = [[one for one in part if not one.left and not one.refused] for part in (first, second)]
    differences = [_errors(answered[0], answered[1], whole)] if all(answered) else []
    readings: tuple[tuple[str, Callable[[LoggedRequest], float | None]], ...] = (
        ("duration ms", lambda one: None if one.failed or one.left or one.refused else one.ms),
        ("score", lambda one: one.score),
        ("feedback", lambda one: one.feedback),
    )
    for what, reading in readings:
        values = [[value for one in part if (value := reading(one)) is not None] for part in (first, second)]
        if all(len(one) > 1 for one in values):
            differences.append(_means(what, values[0], values[1], whole))
    return Result(model, arms, compared, differences)


def _arm(version: str, part: Sequence[LoggedRequest]) -> Arm:
    times = [one.ms for one in part if not one.left and not one.refused] or [0.0]
    cuts = quantiles(times, n=100, method="inclusive") if len(times) > 1 else times * 99
    scores = [one.score for one in part if one.score is not None]
    feedback = [one.feedback for one in part if one.feedback is not None]
    errors, fell_back = sum(one.failed for one in part), sum(one.fell_back for one in part)
    left = sum(one.left for one in part)
    mean_score, mean_feedback = (fmean(values) if values else None for values in (scores, feedback))
    return Arm(version, len(part), errors, fell_back, left, cuts[49], cuts[98], mean_score, mean_feedback)


def _errors(first: Sequence[LoggedRequest], second: Sequence[LoggedRequest], whole: int) -> Difference:
    """The share of requests that failed or that the fallback answered."""
    counts = [sum(one.failed or one.fell_back for one in part) for part in (first, second)]
    sizes = (len(first), len(second))
    shares = [count / size for count, size in zip(counts, sizes, strict=True)]
    spreads = (shares[0] * (1 - shares[0]), shares[1] * (1 - shares[1]))
    return _difference("errors", shares, intervals.difference_of_shares(counts, sizes), sizes, spreads, whole)


def _means(what: str, first: Sequence[float], second: Sequence[float], whole: int) -> Difference:
    means, sizes = [fmean(first), fmean(second)], (len(first), len(second))
    spreads = (stdev(first) ** 2, stdev(second) ** 2)
    return _difference(what, means, intervals.difference_of_means(first, second), sizes, spreads, whole)


def _difference(
    what: str,
    values: Sequence[float],
    interval: Interval,
    sizes: tuple[int, int],
    spreads: tuple[float, float],
    whole: int,
) -> Difference:
    """`whole` is the number of requests of both versions; `sizes` are how many of each have this measure."""
    shares = [size / whole for size in sizes]  # the sample size is split as it is today
    spread = sum(spread / share for spread, share in zip(spreads, shares, strict=True))
    return Difference.between(what, values, interval, sizes, spread, whole)
