"""`torchserve-dag experiment`: which version of a model is better, so far."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from torchserve_dag.commands import durations
from torchserve_dag.commands.common import JsonOption, ProjectOption, fail, failures, out, print_json, project_root

if TYPE_CHECKING:
    from torchserve_dag.releases.experiment import Difference, Result


def experiment(
    name: Annotated[str, typer.Argument(help="A model whose requests are split between versions.")],
    *,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Only requests of this last time: 30m, 6h, 7d; by default all that the logs keep."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a plot, as .svg or .png.")] = None,
    json: JsonOption = False,
    project: ProjectOption = None,
) -> None:
    """Compare the versions of a model by errors, durations and scores, with confidence intervals."""
    from torchserve_dag.releases import plot as picture
    from torchserve_dag.releases import request_log
    from torchserve_dag.releases.experiment import compare
    from torchserve_dag.server.state import State

    begin = _begin(since)
    if plot and plot.suffix not in {".svg", ".png"}:
        fail(f"{plot} is neither an .svg nor a .png: choose one of these endings.")
    with failures():
        requests = request_log.read(State(project_root(project)).logs, name, begin)
        if not requests:
            fail(f"The logs have no requests for {name} that named no version: send some through the front door.")
        result = compare(name, requests)
        if plot:
            picture.draw(result, requests, plot)
    if json:
        print_json(result)
        return
    _print(result)
    if plot:
        out.print(f"wrote {plot}", markup=False)


def _begin(since: str | None) -> dt.datetime | None:
    if since is None:
        return None
    return dt.datetime.now(dt.timezone.utc) - dt.timedelta(seconds=durations.seconds(since, "30m, 6h or 7d"))


def _print(result: Result) -> None:
    table = Table("", *(arm.version for arm in result.arms))
    counts = {"requests": "requests", "errors": "errors", "fell back": "fell_back", "left": "left"}
    for label, name in counts.items():
        table.add_row(label, *(f"{getattr(arm, name):,}" for arm in result.arms))
    table.add_row("p50 ms", *(f"{arm.p50_ms:.0f}" for arm in result.arms))
    table.add_row("p99 ms", *(f"{arm.p99_ms:.0f}" for arm in result.arms))
    out.print(table)
    if not result.differences:
        out.print("Only one version had requests: there is nothing to compare.")
        return
    table = Table("", *result.compared, "difference", "95% interval", "")
    for row in result.differences:
        table.add_row(
            row.what,
            *(_number(row, value) for value in (row.first, row.second, row.difference)),
            _range(row),
            _verdict(row),
        )
    out.print(table)


def _number(row: Difference, value: float) -> str:
    return f"{value:.2%}" if row.what == "errors" else f"{value:.3g}"


def _range(row: Difference) -> str:
    return f"{_number(row, row.low)} to {_number(row, row.high)}"


def _verdict(row: Difference) -> str:
    if row.settled:
        return "[green]settled[/]"
    if row.needed is None:
        return "[dim]nothing differs[/]"
    return f"[yellow]open[/]: about {row.needed:,} more"
