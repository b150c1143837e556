"""What the nodes of a workflow have done, as Prometheus series on TorchServe's own `/metrics`.

TorchServe reads metrics from what its workers print, adds the numbers of one name and labels up, and has histograms of
its own only with fixed buckets and a line for each observation. So a worker prints, once a second, by how much each
bucket has grown: as counters that are named as a histogram's series are. Several workers add up, and the numbers
never fall when one of them is started anew.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from torchserve_dag.runtime.engine.counts import Histogram, NodeCounts

logger = logging.getLogger(__name__)

Series = tuple[str, str, str | None]
"""A node, a metric, and the upper bound of a bucket where it is one."""

PREFIX = "torchserve_dag_node_"


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a node, and its name on `/metrics` behind the prefix."""

    name: str
    unit: str
    meaning: str
    value: Callable[[NodeCounts], int | Histogram]
    """A counter's number, or a histogram."""


METRICS = (
    Metric(
        "items_total",
        "items",
        "Items that ran. A retry counts again, and so does each chunk of a node that streams.",
        lambda counts: counts.items,
    ),
    Metric(
        "failures_total",
        "items",
        "Items that failed, each retry included, whatever `retry` or `on_error` made of the failure.",
        lambda counts: counts.failures,
    ),
    Metric(
        "skipped_total",
        "items",
        "Items that did not run, because of a `when`, a skipped input or `on_error: skip`.",
        lambda counts: counts.skipped,
    ),
    Metric(
        "queue_seconds",
        "seconds",
        "Time that an item waited in the node's queue until a batch took it.",
        lambda counts: counts.queue_s,
    ),
    Metric("run_seconds", "seconds", "Time that a batch ran.", lambda counts: counts.run_s),
    Metric("batch_size", "items", "Items in a batch.", lambda counts: counts.batch),
)

_SEPARATORS = str.maketrans(",:|", "___")
"""What separates the parts of a line, and so cannot be in a name."""


def publish_every(
    period_s: float, workflow: str, version: str, metrics: Callable[[], Mapping[Series, float]]
) -> Publisher:
    """Publish the numbers that `metrics` gives from now on, in a thread that ends with the process or with `close`."""
    publisher = Publisher(workflow, version, metrics)
    threading.Thread(target=publisher.run, args=(period_s,), name="metrics", daemon=True).start()
    return publisher


class Publisher:
    """A worker's metrics, on their way to TorchServe."""

    def __init__(self, workflow: str, version: str, metrics: Callable[[], Mapping[Series, float]]) -> None:
        self._labels = f"workflow:{workflow.translate(_SEPARATORS)},version:{version.translate(_SEPARATORS)}"
        self._host = socket.gethostname()
        self._metrics = metrics
        self._published: Mapping[Series, float] = {}
        self._publishing = threading.Lock()
        self._closed = threading.Event()

    def run(self, period_s: float) -> None:
        """Publish until it is closed, or cannot."""
        try:
            self.publish()
            while not self._closed.wait(period_s):
                self.publish()
        except Exception:
            logger.exception("the metrics of this worker stay as they are")

    def publish(self) -> None:
        """Print what has changed since the last time."""
        with self._publishing:
            if lines := self.lines():
                # In one write, so that what other threads print does not come between.
                sys.stdout.write("\n".join(lines) + "\n")
                sys.stdout.flush()

    def close(self) -> None:
        """Publish for the last time."""
        self._closed.set()
        self.publish()

    def lines(self) -> list[str]:
        """The lines that add what has changed since the last call.

        A series is there from the start, with 0: or Prometheus would not see the first increase. The first line adds
        0 in any case, because it may be lost: `print` writes a text and its end one by one, and another thread's may
        be under way.
        """
        now, before = self._metrics(), self._published
        self._published = now
        new = [series for series in now if series not in before]
        grown = {
            series: value - before.get(series, 0) for series, value in now.items() if value > before.get(series, 0)
        }
        zeros = new or list(grown)[:1]
        return [*(self._line(series, 0) for series in zeros), *(self._line(*one) for one in grown.items())]

    def _line(self, series: Series, increase: float) -> str:
        node, metric, bound = series
        labels = f"{self._labels},node:{node.translate(_SEPARATORS)}" + (f",le:{bound}" if bound else "")
        return (
            f"[METRICS]{PREFIX}{metric}.Count:{increase!r}|#{labels}"
            f"|#type:COUNTER|#hostname:{self._host},{time.time():.0f}"
        )


def series_of(counts: Mapping[str, NodeCounts]) -> dict[Series, float]:
    """Every node's counts as numbers that only grow."""
    return {
        (node, metric, bound): value
        for node, node_counts in counts.items()
        for metric, bound, value in _series(node_counts)
    }


def _series(counts: NodeCounts) -> Iterator[tuple[str, str | None, float]]:
    for metric in METRICS:
        value = metric.value(counts)
        if isinstance(value, Histogram):
            yield from _histogram(metric.name, value)
        else:
            yield metric.name, None, value


def _histogram(name: str, histogram: Histogram) -> Iterator[tuple[str, str | None, float]]:
    """Prometheus's buckets: each counts what the smaller ones count too."""
    bounds = [*map(str, histogram.bounds), "+Inf"]
    for bound, count in zip(bounds, accumulate(histogram.counts), strict=True):
        yield f"{name}_bucket", bound, count
    yield f"{name}_sum", None, histogram.sum
    yield f"{name}_count", None, histogram.count
