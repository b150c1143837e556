"""The mean batch of each node, from the counters of a running server (see docs/metrics.md)."""

from __future__ import annotations

from collections import defaultdict

import httpx

from torchserve_dag.server import prometheus

_LIMIT_S = 10.0

Reading = dict[str, tuple[float, float]]
"""Node → the number of items, and of batches."""


def read(address: str | None) -> Reading:
    """The counters of a server; empty for a server without them."""
    if address is None:
        return {}
    try:
        answer = httpx.get(address, timeout=_LIMIT_S, trust_env=False).raise_for_status()
    except httpx.HTTPError:
        return {}
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"sum": 0.0, "count": 0.0})
    for what, labels, value in prometheus.samples(answer.text, "torchserve_dag_node_batch_size_"):
        if what in {"sum", "count"}:
            found[labels["node"]][what] += value
    return {node: (counted["sum"], counted["count"]) for node, counted in found.items()}


def means(before: Reading, after: Reading) -> dict[str, float]:
    """The mean batch of each node between two readings; nodes without batches are left out."""
    by_node = {}
    for node, (items, batches) in after.items():
        items_before, batches_before = before.get(node, (0.0, 0.0))
        if batches > batches_before:
            by_node[node] = (items - items_before) / (batches - batches_before)
    return by_node
