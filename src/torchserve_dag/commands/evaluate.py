"""`torchserve-dag evaluate`: a data set through a version, or through two beside each other, before it is released."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from torchserve_dag.commands.common import (
    JsonOption,
    ProjectOption,
    count,
    err,
    fail,
    failures,
    out,
    print_json,
    project_root,
)

if TYPE_CHECKING:
    from torchserve_dag.evaluation.results import Evaluation, Score
    from torchserve_dag.releases.experiment import Difference

NAMED = 5
"""So many of the items that failed are printed; the kept result names more."""


def evaluate(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME[/VERSION]", help="What to evaluate: an archive; without VERSION its highest."),
    ],
    *,
    data: Annotated[
        Path,
        typer.Option(metavar="FILE", help='The data: a line {"input": …, "expected": …} for each item, in JSON.'),
    ],
    score: Annotated[
        list[str],
        typer.Option(
            metavar="SCORE",
            help="exact, contains, json, similarity, recall@K, each for a field of the answer too (contains:summary); "
            "or FILE.py:FUNCTION. May be repeated.",
        ),
    ],
    against: Annotated[
        str | None, typer.Option(metavar="NAME[/VERSION]", help="Another version to compare with, on the same data.")
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(metavar="SCORE>=NUMBER", help="What must hold, such as 'recall >= .8'; may be repeated."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="Where models compute: cpu, cuda:0; by default as their files say."),
    ] = None,
    store: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder of the archives; by default the model store.")
    ] = None,
    json: JsonOption = False,
    project: ProjectOption = None,
) -> None:
    """Score a version's answers to a data set, in this process, and keep the result for `rollout --require`.

    Ends with exit status 1 if a requirement is not met, or if a score is lower than that of --against beyond chance.
    """
    from torchserve_dag.evaluation import requirement, results, version
    from torchserve_dag.evaluation.data_set import DataSet
    from torchserve_dag.evaluation.run import EvaluationRun
    from torchserve_dag.evaluation.run import evaluate as run_all
    from torchserve_dag.evaluation.specs import read_specs

    with failures(), ExitStack() as closing:
        root = project_root(project)
        try:
            specs = read_specs(score, root)
            required = [requirement.read(one) for one in require or ()]
        except ValueError as error:
            fail(f"{error}.")
        names = [name] if against is None else [against, name]
        archives = [version.find_version(store or version.model_store(root), one) for one in names]
        scorers = {spec.name: spec.load(root, closing) for spec in specs}
        items = DataSet.read(data, tuple(scorer.check for scorer in scorers.values()))
        runs: list[EvaluationRun] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            for archive in archives:
                which = f"{archive.name}/{archive.version}"
                if changed := version.edited(root, archive):
                    note = f"{', '.join(changed)}: not as in {archive.path.name}, which is evaluated"
                    err.print(note, markup=False, soft_wrap=True)
                task = bar.add_task(f"loading {which}", total=None)
                with version.loaded(root, archive, device) as workflow:
                    bar.update(task, description=which, total=items.items)
                    runs.append(run_all(workflow, items, scorers, lambda task=task: bar.advance(task)))  # type: ignore[misc]
        done = [
            results.Evaluation.of(root, archive, items, specs, run) for archive, run in zip(archives, runs, strict=True)
        ]
        paths = [results.keep(root, one) for one in done]
        differences = results.differences(*runs) if against else []
    unmet = requirement.unmet(done[-1], required)
    if json:
        print_json({"evaluations": done, "differences": differences, "unmet": unmet})
    else:
        _print(done, differences)
        out.print(f"kept in {' and '.join(map(str, paths))}", markup=False, soft_wrap=True)
        for why in unmet:
            err.print(f"[bold red]error:[/] {escape(why)}.", soft_wrap=True)
    if unmet or any(row.settled and row.difference < 0 for row in differences):
        raise typer.Exit(1)


def _print(done: Sequence[Evaluation], differences: Sequence[Difference]) -> None:
    names = _names(done)
    table = Table("", *(title for name in names for title in (name, "95% interval")))
    for name in done[0].scores:
        table.add_row(escape(name), *(cell for one in done for cell in _cells(one.scores[name])))
    table.add_row("items", *(cell for one in done for cell in (f"{one.items:,}", "")))
    table.add_row("failed", *(cell for one in done for cell in (f"{one.errors:,}", "")))
    out.print(table)
    if differences:
        table = Table(f"{names[1]} - {names[0]}", "difference", "95% interval", "")
        for row in differences:
            interval = f"{row.low:+.2f} to {row.high:+.2f}"
            table.add_row(escape(row.what), f"{row.difference:+.3f}", interval, _verdict(row, names[1]))
        out.print(table)
    for one in done:
        for failed in one.failed[:NAMED]:
            where = f"{one.data}:{failed.line}" + (f" ({failed.id})" if failed.id != str(failed.line) else "")
            err.print(f"[yellow]failed[/] {escape(f'{one.name}  {where}: {failed.why}')}", soft_wrap=True)
        if one.errors > NAMED:
            err.print(f"and {count(one.errors - NAMED, 'item')} more of {one.name}", soft_wrap=True)


def _names(done: Sequence[Evaluation]) -> list[str]:
    """What the versions are called in tables: of one model, by their versions alone."""
    short = len({one.model for one in done}) == 1 < len(done)
    return [one.version if short else one.name for one in done]


def _cells(score: Score) -> tuple[str, str]:
    return f"{score.mean:.3f}", f"{score.low:.2f} to {score.high:.2f}"


def _verdict(row: Difference, newer: str) -> str:
    if row.settled:
        better = row.difference > 0
        return f"[{'green' if better else 'red'}]{escape(newer)} is {'better' if better else 'worse'}[/]"
    if row.needed is None:
        return "[dim]nothing differs[/]"
    return f"[yellow]open[/]: about {row.needed:,} more"
