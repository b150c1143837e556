"""95 % confidence intervals: of a share, of a mean, and of differences between two of either."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8
"""The probability that as many more observations as are called needed settle a difference, if its true size is the
observed one."""

Interval = tuple[float, float]

EVERYTHING: Interval = (-math.inf, math.inf)
"""What a single observation says of a mean."""


def share(count: int, size: int) -> Interval:
    """The interval of `count` of `size`: Wilson's (1927)."""
    found = stats.binomtest(count, size).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def mean(values: Sequence[float]) -> Interval:
    """The interval of a mean: Student's (1908)."""
    if len(values) < 2:  # noqa: PLR2004
        return EVERYTHING
    return _around(fmean(values), stdev(values) / math.sqrt(len(values)), len(values) - 1)


def difference_of_shares(counts: Sequence[int], sizes: Sequence[int]) -> Interval:
    """Of the second share minus the first, of different observations: Newcombe's (1998a, method 10)."""
    return _newcombe(counts, sizes, 0.0)


def difference_of_means(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Of the second mean minus the first, of different observations, at least two of each: Welch's (1947)."""
    parts = [stdev(values) ** 2 / len(values) for values in (first, second)]
    difference, error = fmean(second) - fmean(first), math.sqrt(sum(parts))
    if not error:
        return difference, difference
    divisor = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True))
    return _around(difference, error, sum(parts) ** 2 / divisor)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Of the second mean minus the first, where each observation has a value of both.

    Where all values are 0 or 1: Newcombe's for pairs (1998b, method 10), which stays honest where all pairs differ in
    the same way. Student's, of the differences, for all other values.
    """
    if not {*first, *second} <= {0.0, 1.0}:
        return mean([b - a for a, b in zip(first, second, strict=True)])
    sizes = (len(first), len(second))
    return _newcombe((int(sum(first)), int(sum(second))), sizes, _phi(first, second))


def needed(difference: float, spread: float) -> float:
    """How many observations settle a difference, if it is the true one; `spread` is the variance of one observation."""
    reach = float(stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER))
    return spread * (reach / difference) ** 2


def _newcombe(counts: Sequence[int], sizes: Sequence[int], phi: float) -> Interval:
    """`phi` is the correlation of the two: 0 where the observations are different ones."""
    first, second = (count / size for count, size in zip(counts, sizes, strict=True))
    (low1, high1), (low2, high2) = (share(count, size) for count, size in zip(counts, sizes, strict=True))
    down, up = (second - low2, high1 - first), (high2 - second, first - low1)
    difference = second - first
    return difference - _hypotenuse(*down, phi), difference + _hypotenuse(*up, phi)


def _hypotenuse(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))


def _phi(first: Sequence[float], second: Sequence[float]) -> float:
    """The correlation of two lists of 0 and 1, with Newcombe's correction where it is positive."""
    size, both = len(first), sum(a * b for a, b in zip(first, second, strict=True))
    ones = (sum(first), sum(second))
    product = ones[0] * ones[1] * (size - ones[0]) * (size - ones[1])
    if not product:
        return 0.0
    neither = size - ones[0] - ones[1] + both
    excess = both * neither - (ones[0] - both) * (ones[1] - both)
    return (max(0.0, excess - size / 2) if excess > 0 else excess) / math.sqrt(product)


def _around(middle: float, error: float, freedom: float) -> Interval:
    if not error:
        return middle, middle
    reach = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    return middle - reach, middle + reach
