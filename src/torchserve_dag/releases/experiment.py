"""The result of an A/B test so far: differences, their confidence intervals, and how many requests are still needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles, stdev

from scipy import stats

from torchserve_dag.releases.request_log import LoggedRequest

CONFIDENCE = 0.95
POWER = 0.8
"""The probability that `needed` more requests settle a difference, if its true size is the observed one."""


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
    """How many more requests of this model settle the difference; 0 if it is settled; None without a difference."""

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
    """The share of requests that failed or that the fallback answered, with Newcombe's interval (1998, method 10)."""
    counts = [sum(one.failed or one.fell_back for one in part) for part in (first, second)]
    sizes = (len(first), len(second))
    shares = [count / size for count, size in zip(counts, sizes, strict=True)]
    ranges = [
        stats.binomtest(count, size).proportion_ci(CONFIDENCE, method="wilson")
        for count, size in zip(counts, sizes, strict=True)
    ]
    difference = shares[1] - shares[0]
    low = difference - math.hypot(shares[1] - ranges[1].low, ranges[0].high - shares[0])
    high = difference + math.hypot(ranges[1].high - shares[1], shares[0] - ranges[0].low)
    spreads = (shares[0] * (1 - shares[0]), shares[1] * (1 - shares[1]))
    return _difference("errors", shares, (low, high), sizes, spreads, whole)


def _means(what: str, first: Sequence[float], second: Sequence[float], whole: int) -> Difference:
    """The difference of two means, with Welch's interval (1947)."""
    means = [fmean(first), fmean(second)]
    sizes = (len(first), len(second))
    spreads = (stdev(first) ** 2, stdev(second) ** 2)
    parts = [spread / size for spread, size in zip(spreads, sizes, strict=True)]
    error = math.sqrt(sum(parts))
    difference = means[1] - means[0]
    if not error:
        return _difference(what, means, (difference, difference), sizes, spreads, whole)
    freedom = sum(parts) ** 2 / sum(part**2 / (size - 1) for part, size in zip(parts, sizes, strict=True))
    reach = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    return _difference(what, means, (difference - reach, difference + reach), sizes, spreads, whole)


def _difference(
    what: str,
    values: Sequence[float],
    interval: tuple[float, float],
    sizes: tuple[int, int],
    spreads: tuple[float, float],
    whole: int,
) -> Difference:
    """`whole` is the number of requests of both versions; `sizes` are how many of each have this measure."""
    difference = values[1] - values[0]
    interim = Difference(what, values[0], values[1], difference, *interval, sizes, None)
    if interim.settled:
        needed: int | None = 0
    elif difference:
        # The sample size, split as it is today, at which the standard error is small enough for CONFIDENCE and POWER.
        reach = float(stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER))
        shares = [size / whole for size in sizes]
        wanted = sum(spread / share for spread, share in zip(spreads, shares, strict=True)) * (reach / difference) ** 2
        needed = max(0, math.ceil(wanted - whole)) or 1
    else:
        needed = None
    return Difference(what, values[0], values[1], difference, *interval, sizes, needed)
