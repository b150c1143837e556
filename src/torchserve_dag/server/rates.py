"""The rates of each node of a workflow on a running server, from two readings of its metrics."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping

import httpx

from torchserve_dag.pictures.picture import NodeRates
from torchserve_dag.server import prometheus
from torchserve_dag.server.errors import ServerError

Reading = Mapping[str, Mapping[tuple[str, str], float]]
"""Node → (metric, upper bound of a histogram's bucket or "") → sum over all workers."""

_TIMEOUT_S = 10.0


def watch(address: str, workflow: str, version: str, seconds: float) -> dict[str, NodeRates]:
    """The rates of each node that had items; `address` is the metrics address. Raises ServerError."""
    before, start = read(_text(address), workflow, version), time.monotonic()
    if not before:
        raise ServerError(
            f"The running server has no metrics of {workflow} {version}: build it, and restart the server."
        )
    time.sleep(seconds)
    after, elapsed = read(_text(address), workflow, version), time.monotonic() - start
    node_rates = rates(before, after, elapsed)
    if not node_rates:
        raise ServerError(
            f"{workflow} {version} got no request within {seconds:g} s: send some meanwhile, or measure for longer."
        )
    return node_rates


def read(text: str, workflow: str, version: str) -> Reading:
    """Read the metrics of one version of a workflow from Prometheus's text."""
    series: dict[str, dict[tuple[str, str], float]] = defaultdict(lambda: defaultdict(float))
    for metric, labels, value in prometheus.samples(text, "torchserve_dag_node_"):
        if (labels.get("workflow"), labels.get("version")) == (workflow, version):
            series[labels["node"]][metric, labels.get("le", "")] += value
    return series


def rates(before: Reading, after: Reading, seconds: float) -> dict[str, NodeRates]:
    """Node → its rates between two readings; nodes without items are left out."""
    by_node = {}
    for node, now in after.items():
        # The counters of a server that was restarted between the readings began at 0 again.
        grown = {series: max(0.0, value - before.get(node, {}).get(series, 0.0)) for series, value in now.items()}
        if any(grown.values()):
            by_node[node] = _rates(grown, seconds)
    return by_node


def _rates(grown: Mapping[tuple[str, str], float], seconds: float) -> NodeRates:
    def total(metric: str) -> float:
        return grown.get((metric, ""), 0.0)

    def mean(metric: str) -> float:
        return total(f"{metric}_sum") / (total(f"{metric}_count") or 1.0)

    buckets = [(float(bound), count) for (metric, bound), count in grown.items() if metric == "run_seconds_bucket"]
    return NodeRates(
        items_s=total("items") / seconds,
        failures_s=total("failures") / seconds,
        skipped_s=total("skipped") / seconds,
        batch=mean("batch_size"),
        run_s=mean("run_seconds"),
        run_p95_s=quantile(0.95, buckets),
        wait_s=mean("queue_seconds"),
        busy=total("run_seconds_sum") / seconds,
    )


def quantile(share: float, buckets: list[tuple[float, float]]) -> float:
    """Like Prometheus's histogram_quantile: interpolated within a bucket, at most the highest finite bound.

    A bucket is its upper bound and its cumulative count.
    """
    low, below = 0.0, 0.0
    wanted = share * max((count for _, count in buckets), default=0.0)
    for bound, count in sorted(buckets):
        if count >= wanted and count > below:
            return low if math.isinf(bound) else low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return 0.0


def _text(address: str) -> str:
    try:
        answer = httpx.get(f"{address}/metrics", timeout=_TIMEOUT_S, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        raise ServerError(f"{address}/metrics does not answer ({error}).") from None
    return answer.text
