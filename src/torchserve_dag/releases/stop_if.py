"""Conditions for rolling back, like `errors > 1% or p50 > 1.3x`: parsed, and tested against metrics."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torchserve_dag.releases.comparison import Comparison
from torchserve_dag.releases.version_metrics import VersionMetrics
from torchserve_dag.runtime.data.plain import did_you_mean

CHANCE = 0.001
"""The significance level. It is low because the test is repeated every half second of a rollout."""
FEW_ERRORS = 0.001
"""Error rate tolerated when the baseline has no errors."""
TOLERATED_GIVEN_UP = 0.05
"""Share of requests whose clients may give up although they had waited longer than the old version takes."""
PATIENCE_MS = 1000.0
"""How long that is where the old version had too few requests."""
FEW_REQUESTS = 20
"""Baseline requests needed before durations are compared with it."""

_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
_KNOWN = ["errors", *_PERCENTILES]


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition for rolling back."""

    what: str
    """`errors`, or a percentile of the durations."""
    limit: float
    """A share of the requests, or milliseconds; if relative, a multiple of the old version's value."""
    relative: bool

    def reason(self, new: VersionMetrics, old: VersionMetrics) -> str | None:
        """Why to roll back; None if the condition does not hold, or may hold by chance."""
        if self.what == "errors":
            # An error rate as high as the baseline's is tolerated: short client deadlines make both versions fail.
            limit = max(self.limit * old.error_rate, FEW_ERRORS) if self.relative else max(self.limit, old.error_rate)
            if not sure(new.errors, new.requests, limit):
                return None
            than = f", {self.limit:g} times the old version's" if self.relative else ""
            return f"errors {new.error_rate:.1%} of {new.requests} requests, over {limit:.2%}{than}"
        share = _PERCENTILES[self.what]
        before = old.percentile(share)
        if self.relative and (before is None or old.requests < FEW_REQUESTS):
            return None
        limit = self.limit * (before or 0.0) if self.relative else self.limit
        # The percentile exceeds the limit if more than that share of the requests is slower than the limit.
        took = max(new.buckets.values(), default=0)
        if not sure(new.slower_than(limit), took, 1 - share):
            return None
        than = f", {self.limit:g} times the old version's {before:.0f} ms" if self.relative else ""
        return f"{self.what} {new.percentile(share):.0f} ms of {took} requests, over {limit:.0f} ms{than}"


def sure(count: int, of: int, share: float) -> bool:
    """Whether `count` of `of` requests exceed a share beyond chance.

    True if a binomial distribution with that share yields `count` or more with a probability below CHANCE. The upper
    tail is computed exactly, because approximations fail for few requests and for shares near 0.
    """
    from scipy.special import bdtrc  # noqa: PLC0415 (scipy takes a while to import)

    return count > of * share and float(bdtrc(count - 1, of, min(share, 1.0))) < CHANCE


def read(text: str) -> list[Condition]:
    """Parse conditions. Raises ValueError that says what to write instead."""
    return [_condition(part.strip()) for part in re.split(r"\bor\b", text)]


def reason(terms: list[Condition], new: VersionMetrics, old: VersionMetrics) -> str | None:
    """The first reason to roll back. Besides the conditions, clients that give up are one: the version may hang.

    A client that gives up counts only if it had waited longer than 99 % of the old version's answers take: whoever
    cancels at once, or chooses a short deadline, says nothing about the new version.
    """
    enough = old.requests >= FEW_REQUESTS
    patience = (old.percentile(_PERCENTILES["p99"]) if enough else None) or PATIENCE_MS
    given_up, given_up_before = new.given_up_after(patience), old.given_up_after(patience)
    limit = max(TOLERATED_GIVEN_UP, given_up_before / (old.requests + given_up_before) if enough else 0.0)
    whole = new.requests + given_up
    if sure(given_up, whole, limit):
        return f"clients gave up after {patience:.0f} ms in {given_up} of {whole} requests, over {limit:.2%}"
    return next((why for term in terms if (why := term.reason(new, old))), None)


def _condition(text: str) -> Condition:
    term = Comparison.read(text)
    if term is None or term.operator != ">" or not term.unit:
        raise ValueError(f'"{text}" is not a condition: write "errors > 1%", "p99 > 1.3x" or "p95 > 800ms"')
    if term.what not in _KNOWN:
        raise ValueError(f'"{term.what}" is not measured; {did_you_mean(term.what, _KNOWN)}')
    if (term.unit == "%") != (term.what == "errors") and term.unit != "x":
        raise ValueError(f'"{text}": errors are a percentage or times the old version\'s, durations ms, s or times')
    scale = {"%": 0.01, "x": 1.0, "ms": 1.0, "s": 1000.0}[term.unit]
    return Condition(term.what, term.number * scale, term.unit == "x")
