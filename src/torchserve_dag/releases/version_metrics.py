"""Requests, errors and durations of each version, from Envoy's metrics."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from torchserve_dag.archives.archive import ModelVersion
from torchserve_dag.front_door.admin import Admin
from torchserve_dag.front_door.envoy_config import GUARDED, PROTOCOLS, STANDS_IN
from torchserve_dag.server import prometheus

LEFT = frozenset({"-", "DC", "DR"})
"""Envoy's response flags, without a status, for a client that disconnected."""


def gave_up(status: int, flags: str) -> bool:
    """Whether the client ended an attempt: it disconnected, or the deadline that it had chosen passed (408)."""
    return status == HTTPStatus.REQUEST_TIMEOUT or (not status and LEFT.issuperset(flags.split(",")))


@dataclass(frozen=True, slots=True)
class VersionMetrics:
    """Counts of one version: since Envoy started, or between two readings."""

    requests: int = 0
    """Attempts that this version answered or failed; one that the fallback answered counts for both versions. What a
    client decides does not count: bad input, a deadline of its own, a cancel."""
    errors: int = 0
    """Status 5xx, timeout, or no connection."""
    buckets: Mapping[float, int] = field(default_factory=dict)
    """Cumulative histogram: upper bound in milliseconds → attempts up to it."""
    given_up: Mapping[float, int] = field(default_factory=dict)
    """The same for attempts that clients gave up: how long they had waited."""

    def since(self, before: VersionMetrics) -> VersionMetrics:
        """The growth since an earlier reading."""
        grown, given_up = (
            {bound: count - old.get(bound, 0) for bound, count in now.items()}
            for now, old in ((self.buckets, before.buckets), (self.given_up, before.given_up))
        )
        return VersionMetrics(self.requests - before.requests, self.errors - before.errors, grown, given_up)

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    def percentile(self, share: float) -> float | None:
        """In milliseconds, interpolated within its bucket; None without requests."""
        wanted = share * max(self.buckets.values(), default=0)
        if not wanted:
            return None
        low, below = 0.0, 0
        for bound, count in sorted(self.buckets.items()):
            if count >= wanted:
                return low if math.isinf(bound) else low + (bound - low) * (wanted - below) / (count - below)
            low, below = bound, count
        return low

    def slower_than(self, ms: float) -> int:
        """How many attempts took longer than `ms`; attempts in the bucket that contains `ms` do not count."""
        return _above(self.buckets, ms)

    def given_up_after(self, ms: float) -> int:
        """How many attempts clients gave up after they had waited longer than `ms`."""
        return _above(self.given_up, ms)


def _above(buckets: Mapping[float, int], ms: float) -> int:
    whole = max(buckets.values(), default=0)
    return whole - min((count for bound, count in buckets.items() if bound >= ms), default=whole)


def read(admin: Admin) -> dict[ModelVersion, VersionMetrics]:
    """All versions' metrics since Envoy started. Requests that named a version do not count. Raises ServerError."""
    return parse(admin.prometheus("^tries"))


def parse(text: str) -> dict[ModelVersion, VersionMetrics]:
    """Read Envoy's Prometheus page; REST and gRPC are added up."""
    requests: dict[ModelVersion, int] = defaultdict(int)
    errors: dict[ModelVersion, int] = defaultdict(int)
    buckets: dict[ModelVersion, dict[float, int]] = defaultdict(lambda: defaultdict(int))
    given_up: dict[ModelVersion, dict[float, int]] = defaultdict(lambda: defaultdict(int))
    for metric, labels, value in prometheus.samples(text, "envoy_tries_"):
        protocol, _, name = labels["version"].partition(":")
        model, _, version = name.partition(STANDS_IN)[0].removesuffix(GUARDED).rpartition("/")
        if protocol not in PROTOCOLS or not model or labels["route"] == f"{model}/{version}":
            continue
        if metric == "count":
            status = int(labels["status"])
            failed = status >= HTTPStatus.INTERNAL_SERVER_ERROR or not (status or gave_up(0, labels["flags"]))
            if failed or 0 < status < HTTPStatus.BAD_REQUEST:
                requests[model, version] += int(value)
            if failed:
                errors[model, version] += int(value)
        elif metric == "us_bucket":
            buckets[model, version][float(labels["le"]) / 1000] += int(value)
        elif metric == "given_up_ms_bucket" and gave_up(int(labels["status"]), labels["flags"]):
            given_up[model, version][float(labels["le"])] += int(value)
    return {
        one: VersionMetrics(requests[one], errors[one], dict(buckets[one]), dict(given_up[one]))
        for one in requests.keys() | buckets.keys() | given_up.keys()
    }


@dataclass(slots=True)
class Answered:
    """All requests of a version that were answered since Envoy started, also those that named it."""

    by_class: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """By the first digit of the status."""
    us: float = 0.0
    """The time that their answers took, in microseconds; only of answers and failures of the version's own."""


def answered(admin: Admin) -> dict[ModelVersion, Answered]:
    """Raises ServerError."""
    found: dict[ModelVersion, Answered] = defaultdict(Answered)
    for metric, labels, value in prometheus.samples(admin.prometheus("^tries"), "envoy_tries_"):
        protocol, _, name = labels["version"].partition(":")
        model, _, version = name.partition(STANDS_IN)[0].removesuffix(GUARDED).rpartition("/")
        if protocol not in PROTOCOLS or not model:
            continue
        if metric == "count" and labels["status"] != "0":
            found[model, version].by_class[int(labels["status"][0])] += int(value)
        elif metric == "us_sum":
            found[model, version].us += value
    return dict(found)
