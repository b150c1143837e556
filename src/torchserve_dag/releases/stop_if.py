"""When a rollout is stopped: `errors > 1% or p50 > 1.3x`, read, and held against what was measured."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torchserve_dag.releases.version_metrics import VersionMetrics
from torchserve_dag.runtime.data.plain import did_you_mean

CHANCE = 0.001
"""It is looked again and again, and a good version must not be stopped by chance."""
FEW_ERRORS = 0.001
"""So many are no worse than the old version's, where that has none."""
MANY_LEFT = 0.05
"""Of the requests, that their clients do not wait for: they do leave."""
FEW_REQUESTS = 20
"""Fewer of the old version's say nothing of how slow it is."""

_TERM = re.compile(r"(?P<what>\w+) *> *(?P<number>\d+(?:\.\d+)?) *(?P<unit>%|x|ms|s)")
_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
_KNOWN = ["errors", *_PERCENTILES]


@dataclass(frozen=True, slots=True)
class Term:
    """One reason to stop."""

    what: str
    """`errors`, or a percentile of the duration."""
    limit: float
    """A share of the requests, or milliseconds; or how many times the old version's."""
    relative: bool

    def reason(self, new: VersionMetrics, old: VersionMetrics) -> str | None:
        """Why the new version is to be stopped, where that is sure; nothing where it may be chance."""
        if self.what == "errors":
            # No worse than the old version is no reason: clients with deadlines of their own make both fail.
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
        # The percentile is over the limit where more requests are slower than the limit than may be.
        took = max(new.buckets.values(), default=0)
        if not sure(new.slower_than(limit), took, 1 - share):
            return None
        than = f", {self.limit:g} times the old version's {before:.0f} ms" if self.relative else ""
        return f"{self.what} {new.percentile(share):.0f} ms of {took} requests, over {limit:.0f} ms{than}"


def sure(count: int, of: int, share: float) -> bool:
    """Whether `count` of `of` requests exceed a share beyond chance.

    True where the binomial distribution with that share gives so many or more with a probability below CHANCE. Its
    upper tail is computed exactly: for few requests, and shares near 0, no approximation holds.
    """
    from scipy.special import bdtrc  # noqa: PLC0415 (scipy takes a while to import)

    return count > of * share and float(bdtrc(count - 1, of, min(share, 1.0))) < CHANCE


def read(text: str) -> list[Term]:
    """Raises ValueError, with what to write instead."""
    return [_term(part.strip()) for part in re.split(r"\bor\b", text)]


def reason(terms: list[Term], new: VersionMetrics, old: VersionMetrics) -> str | None:
    """The first reason to stop; that clients leave a version, more than the old one, is always one."""
    limit = max(MANY_LEFT, old.left / old.requests if old.requests else 0.0)
    if sure(new.left, new.requests, limit):
        return f"clients left {new.left} of {new.requests} requests before the answer, over {limit:.2%}"
    return next((why for term in terms if (why := term.reason(new, old))), None)


def _term(text: str) -> Term:
    found = _TERM.fullmatch(text)
    if not found:
        raise ValueError(f'"{text}" is not a reason to stop: write "errors > 1%", "p99 > 1.3x" or "p95 > 800ms"')
    what, number, unit = found["what"], float(found["number"]), found["unit"]
    if what not in _KNOWN:
        raise ValueError(f'"{what}" is not measured; {did_you_mean(what, _KNOWN)}')
    if (unit == "%") != (what == "errors") and unit != "x":
        raise ValueError(f'"{text}": errors are a percentage or times the old version\'s, durations ms, s or times')
    scale = {"%": 0.01, "x": 1.0, "ms": 1.0, "s": 1000.0}[unit]
    return Term(what, number * scale, unit == "x")
