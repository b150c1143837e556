"""All the loads of one start of a system, each made by a load generator of its own process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.bench import batches
from torchserve_dag.bench.benchmark_file import BenchmarkFile, Workload
from torchserve_dag.bench.errors import BenchError
from torchserve_dag.bench.load import Grpc, Rest, Spec
from torchserve_dag.bench.programs import Program
from torchserve_dag.bench.rows import LoadRow
from torchserve_dag.bench.systems import System, last_line
from torchserve_dag.bench.window import Counts
from torchserve_dag.clients.address import Protocol
from torchserve_dag.server import json_module

_SPARE_S = 60.0
"""How much longer than planned a load generator may take."""


@dataclass(slots=True)
class Loads:
    """All the loads of one start of a system."""

    plan: BenchmarkFile
    number: int
    work: Workload
    program: Program
    system: System
    bodies: list[Path]
    log: Path
    first: bool = True

    def run(self) -> Iterator[tuple[str, LoadRow | None]]:
        """For each load, what is measured next, and then its row. Raises BenchError."""
        protocols: list[Protocol] = ["rest", "grpc"] if self.system.serving.grpc else ["rest"]
        for protocol in protocols:
            best = 0.0
            for clients in self.work.clients:
                yield f"{protocol}, {clients} clients", None
                row = self._load(protocol, clients=clients)
                best = max(best, row.counts.requests / row.counts.seconds)
                yield f"{protocol}, {clients} clients", row
            for percent in self.work.open if best else ():
                yield f"{protocol}, {percent} % of {best:.1f} a second", None
                yield f"{protocol}, {percent} %", self._load(protocol, percent=percent, rate=best * percent / 100)

    def _load(
        self, protocol: Protocol, *, clients: int | None = None, percent: int | None = None, rate: float | None = None
    ) -> LoadRow:
        plan, serving = self.plan, self.system.serving
        server: Rest | Grpc = Rest(serving.rest, serving.headers)
        if protocol == "grpc" and serving.grpc:
            server = serving.grpc
        spec = Spec(
            server=server,
            bodies=[str(path) for path in self.bodies],
            seconds=plan.seconds,
            warm_up=plan.warm_up if self.first else plan.settle,
            clients=clients,
            rate=rate,
            seed=self.number,
            answer_ends=serving.answer_ends,
        )
        self.first = False
        before, cpu = batches.read(serving.metrics), self.system.cpu_s()
        counts = _generate(spec, self.log)
        if self.system.ended:
            raise BenchError(f"it ended while it was measured: {last_line(self.log)}")
        cpu_ms = 1e3 * max(0.0, self.system.cpu_s() - cpu) / max(1, counts.answered)
        return LoadRow(
            self.number,
            self.work.name,
            self.program.key,
            protocol,
            counts,
            cpu_ms,
            clients,
            percent,
            rate,
            batches.means(before, batches.read(serving.metrics)),
        )


def _generate(spec: Spec, log: Path) -> Counts:
    """One run of the load generator. Raises BenchError."""
    longest = spec.warm_up + spec.seconds + 2 * spec.limit + _SPARE_S
    try:
        return json_module.call("torchserve_dag.bench.load", spec, Counts, longest, log)
    except json_module.ModuleFailedError as error:
        raise BenchError(f"the load generator failed: {error}; see {log}") from None
