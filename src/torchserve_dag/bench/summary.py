"""The summary of all rounds: medians, and ratios to the bare loop of the same round."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from torchserve_dag.bench.benchmark_file import Workload
from torchserve_dag.bench.benchmark_run import BenchmarkRun
from torchserve_dag.bench.programs import BARE, Program
from torchserve_dag.bench.rows import BareRow, LoadRow, Row, SystemRow
from torchserve_dag.bench.window import Percentiles
from torchserve_dag.clients.address import Protocol

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Closed:
    """A closed loop. Rates are requests per second, latencies are in ms."""

    clients: int
    rps: float
    spread: float
    """The spread of the rounds: (highest - lowest) / median."""
    ratio: float | None
    """The rate divided by that of the best arrangement of the bare loop; None if that was not measured."""
    latency_ms: Percentiles | None


@dataclass(frozen=True, slots=True)
class Open:
    """An open loop."""

    percent: int
    latency_ms: Percentiles | None
    """Of the successful requests; None without any."""
    refused: float
    """The share of the requests that were refused."""
    refused_ms: Percentiles | None
    not_sent: int
    """The sum of all rounds."""
    late_ms: Percentiles | None
    """How much later than planned requests were sent."""


@dataclass(frozen=True, slots=True)
class SystemSummary:
    key: str
    name: str
    protocol: Protocol
    ours: bool
    closed: list[Closed]
    open: list[Open]
    cpu_ms: float | None
    """The system's CPU time for each answer, with the most clients."""
    memory_mb: float | None
    startup_s: float | None
    batches: dict[str, float]
    """The mean batch of each node, with the most clients."""
    errors: dict[str, int]
    """The sums of all windows of all rounds; likewise below."""
    different: int
    other_objects: int
    """The number of bodies for which its number of objects differs from that of most systems."""
    error_texts: dict[str, str]
    """For each kind of error, the first text that came with it."""
    problem: str | None


@dataclass(frozen=True, slots=True)
class BareSummary:
    arrangement: str
    rps: float
    ratio: float | None
    p50_ms: float | None
    memory_mb: float | None
    startup_s: float | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class WorkloadSummary:
    work: Workload
    bare: list[BareSummary]
    best_rps: float | None
    """The rate of the bare loop's best arrangement of each round, the median of these."""
    best_p50_ms: float | None
    systems: list[SystemSummary]
    """Sorted by the rate with the most clients, the highest first."""


@dataclass(frozen=True, slots=True)
class Summary:
    run: BenchmarkRun
    rounds: int
    """The number of rounds that have begun."""
    works: list[WorkloadSummary]
    client_cpu_us: dict[str, float]
    """The load generator's own CPU time for each request, by protocol."""


def summarise(run: BenchmarkRun, rows: Sequence[Row]) -> Summary:
    loads = [row for row in rows if isinstance(row, LoadRow)]
    protocols = sorted({row.protocol for row in loads}, reverse=True)
    costs = {name: _median(row.counts.client_cpu_us for row in loads if row.protocol == name) for name in protocols}
    return Summary(
        run,
        len({row.round for row in rows}),
        [_work(run, work, [row for row in rows if row.work == work.name]) for work in run.plan.work],
        {name: cost for name, cost in costs.items() if cost is not None},
    )


def _work(run: BenchmarkRun, work: Workload, rows: Sequence[Row]) -> WorkloadSummary:
    bare = [row for row in rows if isinstance(row, BareRow)]
    measured = [row for row in bare if row.problem is None]
    best = {number: max(row.rps for row in of) for number, of in _by_round(measured).items()}
    lowest = [min(ms) for of in _by_round(measured).values() if (ms := [row.p50_ms for row in of if row.p50_ms])]
    loads = [row for row in rows if isinstance(row, LoadRow)]
    starts = [row for row in rows if isinstance(row, SystemRow)]
    usual = _usual(loads)
    systems = []
    for program in run.programs:
        if program.key == BARE:
            continue
        own = [row for row in loads if row.system == program.key]
        its_starts = [row for row in starts if row.system == program.key]
        protocols = sorted({row.protocol for row in own}, reverse=True) or (["rest"] if its_starts else [])
        systems += [_system(run, program, name, own, its_starts, best, usual) for name in protocols]
    systems.sort(key=lambda one: one.closed[-1].rps if one.closed else 0.0, reverse=True)
    return WorkloadSummary(
        work,
        [
            _bare([row for row in bare if row.arrangement == name], best)
            for name in _unique(r.arrangement for r in bare)
        ],
        _median(best.values()),
        _median(lowest),
        systems,
    )


def _system(
    run: BenchmarkRun,
    program: Program,
    protocol: Protocol,
    loads: list[LoadRow],
    starts: list[SystemRow],
    best: dict[int, float],
    usual: list[int | None],
) -> SystemSummary:
    own = [row for row in loads if row.protocol == protocol]
    closed = _grouped((row.clients, row) for row in own)
    opened = _grouped((row.percent, row) for row in own)
    busiest = closed[max(closed)] if closed else []
    errors: Counter[str] = Counter()
    for row in own:
        errors.update(row.counts.errors)
    nodes = _unique(node for row in busiest for node in row.batches)
    return SystemSummary(
        key=program.key,
        name=program.name,
        protocol=protocol,
        ours=program.key == run.plan.ours,
        closed=[_closed(clients, of, best) for clients, of in sorted(closed.items())],
        open=[_open(percent, of) for percent, of in sorted(opened.items())],
        cpu_ms=_median(row.cpu_ms for row in busiest),
        memory_mb=_median(row.memory_mb for row in starts if row.memory_mb is not None),
        startup_s=_median(row.startup_s for row in starts if row.startup_s is not None),
        batches={node: median(row.batches[node] for row in busiest if node in row.batches) for node in nodes},
        errors=dict(errors),
        error_texts={name: text for row in reversed(own) for name, text in row.counts.error_texts.items()},
        different=sum(row.counts.different for row in own),
        other_objects=max((_others(row.counts.objects_by_body, usual) for row in own), default=0),
        problem=next((row.problem for row in starts if row.problem), None),
    )


def _closed(clients: int, rows: list[LoadRow], best: dict[int, float]) -> Closed:
    rates = [_rps(row) for row in rows]
    middle = median(rates)
    return Closed(
        clients,
        middle,
        (max(rates) - min(rates)) / middle if middle else 0.0,
        _median(_rps(row) / best[row.round] for row in rows if best.get(row.round)),
        _percentiles(row.counts.latency_ms for row in rows),
    )


def _open(percent: int, rows: list[LoadRow]) -> Open:
    ended = [row.counts.requests + sum(row.counts.errors.values()) for row in rows]
    return Open(
        percent,
        _percentiles(row.counts.latency_ms for row in rows),
        median(row.counts.refused / max(1, all_) for row, all_ in zip(rows, ended, strict=True)),
        _percentiles(row.counts.refused_ms for row in rows),
        sum(row.counts.not_sent for row in rows),
        _percentiles(row.counts.late_ms for row in rows),
    )


def _bare(rows: list[BareRow], best: dict[int, float]) -> BareSummary:
    measured = [row for row in rows if row.problem is None]
    return BareSummary(
        rows[0].arrangement,
        _median(row.rps for row in measured) or 0.0,
        _median(row.rps / best[row.round] for row in measured if best.get(row.round)),
        _median(row.p50_ms for row in measured if row.p50_ms is not None),
        _median(row.memory_mb for row in measured if row.memory_mb is not None),
        _median(row.startup_s for row in measured if row.startup_s is not None),
        next((row.problem for row in rows if row.problem), None),
    )


def _rps(row: LoadRow) -> float:
    return row.counts.requests / row.counts.seconds


def _usual(rows: Iterable[LoadRow]) -> list[int | None]:
    """For each body, the number of objects in the answers of most systems."""
    by_system = {row.system: row.counts.objects_by_body for row in rows}
    found = [[count for count in of if count is not None] for of in zip(*by_system.values(), strict=False)]
    return [Counter(counts).most_common(1)[0][0] if counts else None for counts in found]


def _others(found: list[int | None], usual: list[int | None]) -> int:
    return sum(one is not None and one != most for one, most in zip(found, usual, strict=False))


def _percentiles(found: Iterable[Percentiles | None]) -> Percentiles | None:
    """The median over the rounds of each percentile."""
    known = [one for one in found if one]
    if not known:
        return None
    return Percentiles(*(median(values) for values in zip(*((p.p50, p.p95, p.p99) for p in known), strict=True)))


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return median(known) if known else None


def _grouped(pairs: Iterable[tuple[int | None, LoadRow]]) -> dict[int, list[LoadRow]]:
    groups: dict[int, list[LoadRow]] = defaultdict(list)
    for key, row in pairs:
        if key is not None:
            groups[key].append(row)
    return groups


def _by_round(rows: Iterable[BareRow]) -> dict[int, list[BareRow]]:
    rounds: dict[int, list[BareRow]] = defaultdict(list)
    for row in rows:
        rounds[row.round].append(row)
    return rounds


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
