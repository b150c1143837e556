"""The metrics of a workflow's nodes, as Prometheus series on TorchServe's own `/metrics`.

TorchServe reads metrics from its workers' output, and adds up the values of each series. Its own histograms have fixed
buckets, and need a line for each observation. So once a second a worker prints the increase of each bucket, as a
counter with the name of the histogram's series. Counters of several workers add up, and do not fall when a worker is
restarted. A gauge is what its worker printed last.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.telemetry.series import Series

logger = logging.getLogger(__name__)

_SEPARATORS = str.maketrans(",:|", "___")
"""Separators of TorchServe's metric lines, which names cannot contain."""

Read = Callable[[], Mapping[Series, float]]


def publish_every(
    period_s: float,
    workflow: str,
    version: str,
    metrics: Read,
    write: Callable[[str], object],
    gauges: Read = dict,
    worker: str = "",
) -> Publisher:
    """Publish what `metrics` and `gauges` return, every `period_s` seconds, in a thread that ends with `close` or the
    process.

    `write` writes lines that TorchServe obeys; `worker` is the gauges' label.
    """
    publisher = Publisher(workflow, version, metrics, write, gauges, worker)
    threading.Thread(target=publisher.run, args=(period_s,), name="metrics", daemon=True).start()
    return publisher


class Publisher:
    """Prints a worker's metrics for TorchServe."""

    def __init__(
        self,
        workflow: str,
        version: str,
        metrics: Read,
        write: Callable[[str], object],
        gauges: Read = dict,
        worker: str = "",
    ) -> None:
        self._labels = f"workflow:{workflow.translate(_SEPARATORS)},version:{version.translate(_SEPARATORS)}"
        self._host = socket.gethostname()
        self._metrics, self._write, self._gauges, self._worker = metrics, write, gauges, worker
        self._published: Mapping[Series, float] = {}
        self._shown: Mapping[Series, float] = {}
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
            before = self._published, self._shown
            try:
                self._write("".join(f"{line}\n" for line in self.lines()))
            except OSError:
                self._published, self._shown = before  # the next call writes these increases, too
                raise

    def close(self) -> None:
        """Publish for the last time."""
        self._closed.set()
        self.publish()

    def lines(self) -> list[str]:
        """The lines with the increases since the last call, and with the gauges that have changed.

        A series starts with 0, so that Prometheus sees its first increase.
        """
        now, before = self._metrics(), self._published
        self._published = now
        new = [series for series in now if series not in before]
        increases = {
            series: value - before.get(series, 0) for series, value in now.items() if value > before.get(series, 0)
        }
        shown, self._shown = self._shown, self._gauges()
        changed = {series: value for series, value in self._shown.items() if shown.get(series) != value}
        return [
            *(self._line(series, 0) for series in new),
            *(self._line(series, increase) for series, increase in increases.items()),
            *(self._line(series, value, "GAUGE") for series, value in changed.items()),
        ]

    def _line(self, series: Series, value: float, kind: Literal["COUNTER", "GAUGE"] = "COUNTER") -> str:
        node, name, labels = series
        more = (("worker", self._worker),) if kind == "GAUGE" else ()
        of_node = (("node", node),) if node else ()
        about = "".join(f",{key}:{text.translate(_SEPARATORS)}" for key, text in (*of_node, *labels, *more))
        origin = f"#hostname:{self._host},{time.time():.0f}"
        return f"[METRICS]{name}.Count:{value!r}|#{self._labels}{about}|#type:{kind}|{origin}"
