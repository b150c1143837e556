"""The summary as pictures, SVG and PNG."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchserve_dag.bench.errors import BenchError
from torchserve_dag.bench.report import label
from torchserve_dag.bench.summary import Summary, SystemSummary, WorkloadSummary

_OURS = "#1552c4"
_OTHERS = ("#c2571a", "#3c8d5a", "#8a4fb5", "#a3842c", "#b03a5b", "#4b8fa3", "#6b6b6b", "#7d5a3c")
_MARKERS = "osD^vPX*"
_LINES = {"rest": "-", "grpc": (0, (4, 2))}
_ENOUGH = 3
"""The fewest points of a line that is drawn."""

_WORTH_COMPARING = 0.1
"""Ratios to the bare loop are drawn if some system's ratio is above this; else rates are drawn."""

Points = list[tuple[float, float]]
Series = list[tuple[SystemSummary, Points]]


def draw(summary: Summary, folder: Path) -> dict[str, list[str]]:
    """Write the pictures. Returns their SVG files by the workload's name; "" for pictures of several workloads.

    Raises BenchError if matplotlib is missing.
    """
    drawing = _Drawing(summary, folder)
    found: dict[str, list[str]] = defaultdict(list)
    for work in summary.works:
        found[work.work.name] = _of_work(drawing, work)
    for series, works in _series(summary).items():
        best = [_best_by_at(system, works) for system in _systems(works)]
        name = f"by-{works[0].work.slug}"
        found[""] += drawing.lines(name, best, f"Best rate by {series}", series, "requests a second", log_y=True)
    return {name: files for name, files in found.items() if files}


def _of_work(drawing: _Drawing, work: WorkloadSummary) -> list[str]:
    name, slug = work.work.name, work.work.slug
    files = []
    if len(work.work.clients) >= _ENOUGH:
        ratios = _each(work, lambda one: [(c.clients, c.ratio) for c in one.closed if c.ratio is not None])
        title = f"{name}: rate"
        if max((ratio for _, points in ratios for _, ratio in points), default=0.0) > _WORTH_COMPARING:
            files += drawing.lines(
                f"{slug}-rate", ratios, title, "clients", "rate / bare loop's rate", log_x=True, one="bare loop"
            )
        else:  # the bare loop does next to nothing in this work, so its rate is no baseline
            rates = _each(work, lambda one: [(c.clients, c.rps) for c in one.closed])
            files += drawing.lines(f"{slug}-rate", rates, title, "clients", "requests a second", log_x=True)
    if len(work.work.open) >= _ENOUGH:
        waits = _each(work, lambda one: [(o.percent, o.latency_ms.p99) for o in one.open if o.latency_ms])
        title, axis = f"{name}: p99 latency of what was accepted", "arrivals, % of the system's own best rate"
        files += drawing.lines(f"{slug}-p99", waits, title, axis, "p99 in ms", log_y=True)
    return files


def _each(work: WorkloadSummary, points: Callable[[SystemSummary], Points]) -> Series:
    return [(system, points(system)) for system in work.systems]


def _series(summary: Summary) -> dict[str, list[WorkloadSummary]]:
    found: dict[str, list[WorkloadSummary]] = defaultdict(list)
    for work in summary.works:
        if work.work.series:
            found[work.work.series].append(work)
    return {name: works for name, works in found.items() if len(works) > 1}


def _systems(works: list[WorkloadSummary]) -> list[SystemSummary]:
    return list({(one.key, one.protocol): one for work in works for one in work.systems}.values())


def _best_by_at(system: SystemSummary, works: list[WorkloadSummary]) -> tuple[SystemSummary, Points]:
    """A system's best rate in each work of a series."""
    points = [
        (work.work.at or 0.0, max(closed.rps for closed in one.closed))
        for work in works
        for one in work.systems
        if (one.key, one.protocol) == (system.key, system.protocol) and one.closed
    ]
    return system, sorted(points)


class _Drawing:
    def __init__(self, summary: Summary, folder: Path) -> None:
        try:
            importlib.import_module("matplotlib").use("Agg")
        except ImportError:
            raise BenchError(
                "The plots need matplotlib, which is missing: pip install 'torchserve-dag[bench]'."
            ) from None
        self._plt: Any = importlib.import_module("matplotlib.pyplot")
        self._ticker: Any = importlib.import_module("matplotlib.ticker")
        self._folder = folder
        others = [one.key for one in summary.run.programs if one.key != summary.run.plan.ours]
        self._looks = {key: (_OTHERS[i % len(_OTHERS)], _MARKERS[i % len(_MARKERS)]) for i, key in enumerate(others)}

    def lines(
        self,
        name: str,
        series: Series,
        title: str,
        x: str,
        y: str,
        *,
        log_x: bool = False,
        log_y: bool = False,
        one: str = "",
    ) -> list[str]:
        """Draw a line for each system, and one at 1 if `one` names it. Without any point, draw nothing."""
        series = [(system, points) for system, points in series if points]
        if not series:
            return []
        figure, axis = self._plt.subplots(figsize=(9, 4.8), layout="constrained")
        for system, points in sorted(series, key=lambda one: one[0].ours):  # ours above the others
            axis.plot(*zip(*points, strict=True), label=label(system), **self._look(system))
        if one:
            axis.axhline(1, color="#444444", linewidth=1.2, linestyle=":", label=one, zorder=1)
        ticks = sorted({at for _, points in series for at, _ in points})
        if log_x:
            axis.set_xscale("log", base=2)
        if log_y:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(self._ticker.LogLocator(subs=(1, 2, 5), numticks=12))
            axis.yaxis.set_major_formatter(self._ticker.StrMethodFormatter("{x:,g}"))
            axis.yaxis.set_minor_locator(self._ticker.NullLocator())
        else:
            axis.set_ylim(bottom=0)
        axis.set_xticks(ticks, [f"{at:g}" for at in ticks])
        axis.xaxis.set_minor_locator(self._ticker.NullLocator())
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.set_title(title, loc="left", fontweight="bold")
        axis.grid(color="#dddddd", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
        for suffix in (".svg", ".png"):
            figure.savefig(self._folder / f"{name}{suffix}", dpi=130)
        self._plt.close(figure)
        return [f"{name}.svg"]

    def _look(self, system: SystemSummary) -> dict[str, Any]:
        line = {"linestyle": _LINES[system.protocol]}
        if system.ours:
            return line | {"color": _OURS, "linewidth": 3.0, "marker": "o", "markersize": 7}
        colour, marker = self._looks[system.key]
        return line | {"color": colour, "linewidth": 1.4, "marker": marker, "markersize": 5, "alpha": 0.9}
