"""The metrics of a workflow's nodes, as Prometheus series on TorchServe's own `/metrics`.

TorchServe reads metrics from its workers' output, and adds up the values of each series. Its own histograms have fixed
buckets, and need a line for each observation. So once a second a worker prints the increase of each bucket, as a
counter with the name of the histogram's series. Counters of several workers add up, and do not fall when a worker is
restarted.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.engine.counts import Histogram, NodeCounts

logger = logging.getLogger(__name__)

Series = tuple[str, str, str | None]
"""A node, a metric, and for a bucket its upper bound."""

PREFIX = "torchserve_dag_node_"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of every node; its name on `/metrics` follows the prefix."""

    name: str
    unit: str
    meaning: str
    value: Callable[[NodeCounts], int | Histogram]
    """Reads the metric from a node's counters: a number, or a histogram."""


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
"""Separators of TorchServe's metric lines, which names cannot contain."""


def publish_every(
    period_s: float,
    workflow: str,
    version: str,
    metrics: Callable[[], Mapping[Series, float]],
    write: Callable[[str], object],
) -> Publisher:
    """Publish what `metrics` returns, every `period_s` seconds, in a thread that ends with `close` or the process.

    `write` writes lines that TorchServe obeys.
    """
    publisher = Publisher(workflow, version, metrics, write)
    threading.Thread(target=publisher.run, args=(period_s,), name="metrics", daemon=True).start()
    return publisher


class Publisher:
    """Prints a worker's metrics for TorchServe."""

    def __init__(
        self,
        workflow: str,
        version: str,
        metrics: Callable[[], Mapping[Series, float]],
        write: Callable[[str], object],
    ) -> None:
        self._labels = f"workflow:{workflow.translate(_SEPARATORS)},version:{version.translate(_SEPARATORS)}"
        self._host = socket.gethostname()
        self._metrics, self._write = metrics, write
        self._published: Mapping[Series, float] = {}
        self._publishing = threading.Lock()
        self._closed = threading.Event()

    def run(self, period_s: float) -> None:
        """Publish until it is closed, or there are no metrics.

        Where writing fails it goes on: `write` starts the worker's relay again, without which the worker would block.
        """
        try:
            while True:
                try:
                    self.publish()
                except OSError as error:
                    logs.report(logger, error, "the metrics of this worker cannot be written", line=False)
                if self._closed.wait(period_s):
                    return
        except Exception:
            logger.exception("the metrics of this worker are no longer updated")

    def publish(self) -> None:
        """Write the increases since the last call; nothing too, for `write` also watches what passes it on."""
        with self._publishing:
            before = self._published
            try:
                self._write("".join(f"{line}\n" for line in self.lines()))
            except OSError:
                self._published = before  # the next call writes these increases, too
                raise

    def close(self) -> None:
        """Publish for the last time."""
        self._closed.set()
        self.publish()

    def lines(self) -> list[str]:
        """The lines with the increases since the last call.

        A series starts with 0, so that Prometheus sees its first increase.
        """
        now, before = self._metrics(), self._published
        self._published = now
        new = [series for series in now if series not in before]
        increases = {
            series: value - before.get(series, 0) for series, value in now.items() if value > before.get(series, 0)
        }
        return [
            *(self._line(series, 0) for series in new),
            *(self._line(series, increase) for series, increase in increases.items()),
        ]

    def _line(self, series: Series, increase: float) -> str:
        node, metric, bound = series
        labels = f"{self._labels},node:{node.translate(_SEPARATORS)}" + (f",le:{bound}" if bound else "")
        return (
            f"[METRICS]{PREFIX}{metric}.Count:{increase!r}|#{labels}"
            f"|#type:COUNTER|#hostname:{self._host},{time.time():.0f}"
        )


def series_of(counts: Mapping[str, NodeCounts]) -> dict[Series, float]:
    """The counters of all nodes."""
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
    """A Prometheus histogram, whose buckets are cumulative."""
    bounds = [*map(str, histogram.bounds), "+Inf"]
    for bound, count in zip(bounds, accumulate(histogram.counts), strict=True):
        yield f"{name}_bucket", bound, count
    yield f"{name}_sum", None, histogram.sum
    yield f"{name}_count", None, histogram.count
