"""The direct host's page of metrics: TorchServe's names for requests, machine and workers; the nodes' of all workers.

A worker that has ended still counts with what it last said, so that no sum of a version falls while the keeper runs.
"""

from __future__ import annotations

import socket
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, UntypedMetricFamily
from prometheus_client.metrics_core import Metric

from torchserve_dag.archives.archive import ModelVersion
from torchserve_dag.front_door.door import Door
from torchserve_dag.releases import version_metrics
from torchserve_dag.runtime.telemetry.series import MODEL, PROVIDER, Series, vllm_names
from torchserve_dag.server.errors import ServerError
from torchserve_dag.stack.workers import Workers

Numbers = dict[Series, float]
_MB = 2**20


class MetricsPage:
    """What `/metrics` shows."""

    def __init__(self, door: Door, workers: Workers, *, vllm_names_of_all: bool = False) -> None:
        """`vllm_names_of_all`: whether language models of all engines are there under vLLM's names, too."""
        self._door, self._workers, self._all_as_vllm = door, workers, vllm_names_of_all
        self._host = socket.gethostname()
        self._said: dict[tuple[ModelVersion, str], Numbers] = {}
        """The latest metrics of each worker, by its version and id."""
        self._gauges: dict[tuple[ModelVersion, str], Numbers] = {}
        """Likewise, of those that answer now."""
        self._ended: dict[ModelVersion, Numbers] = {}
        """Those of all workers that have ended, by version."""
        self._lock = threading.Lock()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> str:
        """The page, in Prometheus's text format."""
        with self._lock:
            return generate_latest(self._registry).decode()

    def describe(self) -> Iterable[Metric]:
        """For the registry, which would otherwise collect when it is made."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        yield from self._requests()
        yield from self._machine()
        yield from self._nodes()

    def _requests(self) -> Iterator[Metric]:
        try:
            answered = version_metrics.answered(self._door.admin)
        except ServerError:  # Envoy is being started
            return
        about = ["model_name", "model_version", "hostname"]
        requests = UntypedMetricFamily("ts_inference_requests_total", "Requests that were answered.", labels=about)
        latency = UntypedMetricFamily("ts_inference_latency_microseconds", "Their whole time.", labels=about)
        classes: dict[int, int] = defaultdict(int)
        for (model, version), counts in answered.items():
            requests.add_metric([model, version, self._host], sum(counts.by_class.values()))
            latency.add_metric([model, version, self._host], counts.us)
            for status, count in counts.by_class.items():
                classes[status] += count
        yield requests
        yield latency
        for status in (2, 4, 5):
            what = f"Requests{status}XX"
            family = UntypedMetricFamily(what, f"Requests with a status from {status}00.", labels=["Level", "Hostname"])
            family.add_metric(["Host", self._host], classes[status])
            yield family

    def _machine(self) -> Iterator[Metric]:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
        values = {
            "CPUUtilization": psutil.cpu_percent(),
            "MemoryUsed": memory.used / _MB,
            "MemoryAvailable": memory.available / _MB,
            "MemoryUtilization": memory.percent,
            "DiskUsage": disk.used / 2**30,
            "DiskAvailable": disk.free / 2**30,
            "DiskUtilization": disk.percent,
        }
        for name, value in values.items():
            family = GaugeMetricFamily(name, "As TorchServe has it.", labels=["Level", "Hostname"])
            family.add_metric(["Host", self._host], value)
            yield family

    def _nodes(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for (model, version), total in sorted(self._totals().items()):
            for series, value in total.items():
                self._add(families, UntypedMetricFamily, (model, version), series, value)
        for ((model, version), worker), gauges in sorted(self._gauges.items()):
            for (node, name, labels), value in gauges.items():
                series = (node, name, (*labels, ("worker", worker)))
                self._add(families, GaugeMetricFamily, (model, version), series, value)
        yield from families.values()

    def _add(
        self,
        families: dict[str, Metric],
        kind: type[UntypedMetricFamily | GaugeMetricFamily],
        version: ModelVersion,
        series: Series,
        value: float,
    ) -> None:
        node, name, more = series
        of_node = {"node": node} if node else {}
        labels = {"workflow": version[0], "version": version[1], **of_node, "Hostname": self._host, **dict(more)}
        names = [(name, labels)]
        if MODEL in labels and (self._all_as_vllm or labels[PROVIDER] == "vllm"):
            names += [(one, {"model_name": labels[MODEL], **labels}) for one in vllm_names(name, more)]
        for one, its_labels in names:
            family = families.setdefault(one, kind(one, "See docs/metrics.md."))
            family.add_sample(one, its_labels, value)

    def _totals(self) -> dict[ModelVersion, Numbers]:
        states = self._workers.states()
        versions = {one.hosted.key for one in states}
        there = {(one.hosted.key, worker.id) for one in states for worker in one.workers}
        self._gauges = {}
        for key in versions:
            for worker in self._workers.ready(key):
                said = worker.ask("metrics")
                if said is not None:
                    self._said[key, worker.record.id] = _numbers(said["metrics"])
                    self._gauges[key, worker.record.id] = _numbers(said["gauges"])
        for of in self._said.keys() - there:
            total = self._ended.setdefault(of[0], defaultdict(float))
            for one, value in self._said.pop(of).items():
                total[one] += value
        self._ended = {key: total for key, total in self._ended.items() if key in versions}
        totals: dict[ModelVersion, Numbers] = {key: defaultdict(float, total) for key, total in self._ended.items()}
        for (key, _), said in self._said.items():
            total = totals.setdefault(key, defaultdict(float))
            for one, value in said.items():
                total[one] += value
        return totals


def _numbers(said: Iterable[Sequence[Any]]) -> Numbers:
    """What a worker's JSON says."""
    return {(node, name, tuple((key, text) for key, text in labels)): value for node, name, labels, value in said}
