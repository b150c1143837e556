"""The summary as Markdown: for each workload, the bare loop and every system."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from torchserve_dag.bench.summary import Closed, Open, Summary, SystemSummary, WorkloadSummary
from torchserve_dag.bench.window import Percentiles

T = TypeVar("T")

_NONE = "-"
_PROTOCOLS = {"rest": "REST", "grpc": "gRPC"}
_OPEN = (
    "Open loop, arrivals in per cent of the system's own best rate above. Latency of what was accepted, p50 / p99 in"
    " ms, counted from the planned arrival; what was refused, and how fast, p50 / p99 in ms:"
)
_LATE_MS = 5.0
"""Asyncio wakes within a millisecond; a load generator that is later than this waited for a core."""
_LEAST_RATIO = 0.01
"""A smaller ratio is left out: the bare loop does next to nothing in that work, so its rate is no baseline."""
_TEN, _HUNDRED = 10, 100


def markdown(summary: Summary, pictures: dict[str, list[str]]) -> str:
    """The whole report. `pictures`: the files to show, by the workload's name; those under "" come first."""
    blocks = [_head(summary), *map(_picture, pictures.get("", []))]
    for work in summary.works:
        blocks += _work(work, pictures.get(work.work.name, []))
    return "\n\n".join(block for block in blocks if block) + "\n"


def label(system: SystemSummary) -> str:
    """A system's name in tables and pictures."""
    return system.name if system.protocol == "rest" else f"{system.name}, {_PROTOCOLS[system.protocol]}"


def _head(summary: Summary) -> str:
    run, machine = summary.run, summary.run.machine
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    pins = [f"{one.name}: {', '.join(one.dependencies)}" for one in run.programs if one.dependencies]
    costs = [f"{cost:.0f} over {_PROTOCOLS[name]}" for name, cost in summary.client_cpu_us.items()]
    lines = [
        "# Benchmark",
        "",
        f"{run.date}; {machine.processor}, {machine.cores} cores, {machine.memory_gb:.0f} GB; {machine.system}.",
        f"Python {machine.python}; {packages}.",
        *([f"Pins of the systems: {'; '.join(pins)}."] if pins else []),
        "",
        f"Medians of {summary.rounds} round{'s' * (summary.rounds != 1)}, windows of {run.plan.seconds:g} s.",
        "In each round every system was started anew for every workload, one at a time, in an order that changes.",
        "A ratio is taken to the bare loop, the same models and functions without any server, in its best arrangement",
        "of the same round.",
        "The load generator shares the machine with the system that it measures; its own CPU time for each request, in",
        f"microseconds: {', '.join(costs) or _NONE}.",
        "",
        "How each system runs:",
        "",
        *(f"- **{one.name}**: {one.arrangement}" for one in run.programs),
    ]
    return "\n".join(lines)


def _work(workload: WorkloadSummary, pictures: Sequence[str]) -> list[str]:
    blocks = [f"## {workload.work.name}", _bare_sentence(workload), *map(_picture, pictures)]
    measured = [one for one in workload.systems if one.closed]
    if measured:
        blocks += [
            "Requests a second" + ("" if workload.best_rps is None else ", and their ratio to the bare loop's") + ":",
            _by_clients(measured, _rate),
            "Latency in ms, p50 / p95 / p99:",
            _by_clients(measured, lambda one: _three(one.latency_ms)),
        ]
    if workload.work.open and any(one.open for one in measured):
        blocks += [
            _OPEN,
            _by_percent(measured),
        ]
    if measured:
        blocks += ["Resources and errors:", _takes(measured)]
    blocks += [_bare_table(workload)]
    blocks += ["\n".join(_remarks(workload))]
    return blocks


def _bare_sentence(workload: WorkloadSummary) -> str:
    if workload.best_rps is None:
        return "The bare loop was not measured."
    alone = "" if workload.best_p50_ms is None else f"; one request at a time takes {_figure(workload.best_p50_ms)} ms"
    return f"The bare loop: {_figure(workload.best_rps)} requests a second{alone}."


def _by_clients(systems: list[SystemSummary], cell: Callable[[Closed], str]) -> str:
    counts = sorted({one.clients for system in systems for one in system.closed})
    head = ["system", *(_clients(count) for count in counts)]
    lines = []
    for system in systems:
        cells = {one.clients: cell(one) for one in system.closed}
        lines.append([_name(system), *(cells.get(count, _NONE) for count in counts)])
    return _table(head, lines)


def _by_percent(systems: list[SystemSummary]) -> str:
    percents = sorted({one.percent for system in systems for one in system.open})
    lines = []
    for system in systems:
        cells = {one.percent: _accepted(one) for one in system.open}
        lines.append([_name(system), *(cells.get(percent, _NONE) for percent in percents)])
    return _table(["system", *(f"{percent} %" for percent in percents)], lines)


def _takes(systems: list[SystemSummary]) -> str:
    head = [
        "system",
        "memory MB",
        "CPU ms a request",
        "start-up s",
        "mean batch",
        "spread",
        "errors",
        "changed answers",
    ]
    lines = [
        [
            _name(one),
            _figure(one.memory_mb),
            _figure(one.cpu_ms),
            _figure(one.startup_s),
            ", ".join(f"{node} {size:.1f}" for node, size in one.batches.items()) or _NONE,
            f"{max(closed.spread for closed in one.closed):.0%}",
            ", ".join(f"{count} x {name}" for name, count in one.errors.items()) or "0",
            str(one.different),
        ]
        for one in systems
    ]
    return _table(head, lines)


def _bare_table(workload: WorkloadSummary) -> str:
    measured = [one for one in workload.bare if one.rps]
    if not measured:
        return ""
    lines = [
        [one.arrangement, f"{_figure(one.rps)} ({one.ratio or 0:.2f})", _figure(one.p50_ms), _figure(one.memory_mb)]
        for one in measured
    ]
    head = ["processes x threads, batch", "requests a second", "p50 ms", "memory MB"]
    return "The bare loop's arrangements:\n\n" + _table(head, lines)


def _remarks(workload: WorkloadSummary) -> Iterable[str]:
    for name, problem in _unique(
        [(one.name, one.problem) for one in workload.systems]
        + [(f"bare loop, {b.arrangement}", b.problem) for b in workload.bare]
    ):
        if problem:
            yield f"- {name}: {problem}"
    for system in workload.systems:
        for name, text in system.error_texts.items():
            yield f"- {label(system)}, the first {name}: `{text}`"
        if system.other_objects:
            yield f"- {label(system)} finds another number of objects than most, in {system.other_objects} bodies."
        not_sent = sum(one.not_sent for one in system.open)
        if not_sent:
            yield f"- {label(system)}: {not_sent} arrivals were not sent, because too many requests were outstanding."
        late = max((one.late_ms.p50 for one in system.open if one.late_ms), default=0.0)
        if late > _LATE_MS:
            yield f"- {label(system)}: the load generator lacked CPU time, and sent requests {late:.0f} ms late."


def _accepted(one: Open) -> str:
    text = f"{_figure(one.latency_ms.p50)} / {_figure(one.latency_ms.p99)}" if one.latency_ms else _NONE
    if one.refused_ms:
        text += f"; {one.refused:.0%} refused in {_figure(one.refused_ms.p50)} / {_figure(one.refused_ms.p99)}"
    return text


def _rate(one: Closed) -> str:
    return _figure(one.rps) + ("" if one.ratio is None or one.ratio < _LEAST_RATIO else f" ({one.ratio:.2f})")


def _three(percentiles: Percentiles | None) -> str:
    return " / ".join(map(_figure, (percentiles.p50, percentiles.p95, percentiles.p99))) if percentiles else _NONE


def _clients(count: int) -> str:
    return "1 client" if count == 1 else f"{count} clients"


def _name(system: SystemSummary) -> str:
    return f"**{label(system)}**" if system.ours else label(system)


def _figure(value: float | None) -> str:
    """A number with three digits; more are noise."""
    if value is None:
        return _NONE
    return f"{value:,.0f}" if value >= _HUNDRED else f"{value:.1f}" if value >= _TEN else f"{value:.2f}"


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _picture(file: str) -> str:
    return f"![{file.removesuffix('.svg').replace('-', ' ')}]({file})"


def _unique(items: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(items))
