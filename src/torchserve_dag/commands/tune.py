"""`torchserve-dag tune`: measure with which settings a handler runs fastest on this machine."""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from torchserve_dag.commands.common import JsonOption, ProjectOption, err, fail, failures, out, print_json, project_root
from torchserve_dag.commands.tune_language import tune_language

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from torchserve_dag.runtime.data.source import Source
    from torchserve_dag.runtime.project.folders import Project
    from torchserve_dag.runtime.project.handler_file import HandlerFile
    from torchserve_dag.tuning.search import Trial

TUNED = ("runtime", "precision", "channels_last", "batch")


def tune(
    node: Annotated[str, typer.Argument(metavar="HANDLER[/VERSION]", help="The handler to tune.")],
    *,
    item: Annotated[
        list[Path] | None,
        typer.Option("--item", metavar="FILE|DIR", help="Items to measure with; by default the handler's own example."),
    ] = None,
    within: Annotated[
        float,
        typer.Option(
            help="Tolerated difference of numbers from plain torch's: absolute below 1, relative above.", min=0.0
        ),
    ] = 0.005,
    seconds: Annotated[float, typer.Option(help="Duration of a measurement; a trial has two.", min=0.1)] = 3.0,
    pause: Annotated[
        float,
        typer.Option(
            help="Of a language model: the longest pause, in ms, of an answer while a long prompt enters.", min=1.0
        ),
    ] = 200.0,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also try torch.compile, which takes minutes.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the table, but do not change the handler's file.")
    ] = False,
    json: JsonOption = False,
    project: ProjectOption = None,
) -> None:
    """Measure a handler under each runtime, precision and batch size, and write the fastest into its YAML.

    Only settings that give the same answers as plain torch are chosen. Of a language model it measures
    `prefill_tokens`, `threads`, `room` and the cache, with up to 32 clients.
    """
    from torchserve_dag.runtime.compute.cores import cores
    from torchserve_dag.runtime.project.folders import Project
    from torchserve_dag.tuning.search import TrialError, best, search
    from torchserve_dag.tuning.trial import Task
    from torchserve_dag.tuning.write import check_writable, write_settings

    with failures():
        root = project_root(project)
        opened = Project(root)
        file = opened.handler(node)
        language = _is_language_model(opened, file)
        if not dry_run:
            check_writable(file.path, "settings" if language else "run")
        if language:
            tune_language(root, file, seconds, pause, dry_run=dry_run, json=json)
            return
        task = Task(str(root.resolve()), str(file.path.resolve()), file.value.run, _files(item or []), seconds)
        trials: list[Trial] = []
        with err.status(f"measuring {node} in plain torch"):
            try:
                for trial in search(task, within=within, compiled=compiled):
                    trials.append(trial)
                    err.print(f"  {_name(trial)}: {_result(trial)}", style="dim", markup=False)
            except TrialError as error:
                fail(f"{node} does not run in plain torch: {error}.")
        winner = best(trials, within)
        chosen = {key: getattr(winner.run, key) for key in TUNED}
        new = {key: value for key, value in chosen.items() if value != getattr(file.value.run, key)}
        on = f"tuned on {dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}, {cores()} cores"
        changed = [] if dry_run else write_settings(file.path, new, on)
    if json:
        print_json({"trials": [_fields(trial) for trial in trials], "chosen": chosen, "changed": changed})
        return
    out.print(_table(trials, winner, within))
    out.print(f"Fastest with the same answers: {escape(_name(winner))}.")
    for line in changed:
        out.print(f"[green]{file.path}[/]: {escape(line.strip())}", soft_wrap=True)
    if not changed:
        out.print(f"{file.path} is unchanged.", soft_wrap=True)


def _is_language_model(project: Project, file: Source[HandlerFile]) -> bool:
    """Ends the command for another model with an engine of its own."""
    from torchserve_dag.runtime.handler import ContinuousHandler
    from torchserve_dag.runtime.models.language.settings import LanguageSettings

    kind = project.handler_class(file)
    if not issubclass(kind, ContinuousHandler):
        return False
    if not isinstance(project.settings(file, kind), LanguageSettings):
        fail(f"{file.value.name} has an engine of its own, whose settings only its author knows: tune cannot try them.")
    return True


def _files(named: list[Path]) -> list[str]:
    """The given files, and those in given folders. Ends the command if there are none."""
    files = [f for path in named for f in (sorted(path.iterdir()) if path.is_dir() else [path])]
    paths = [str(f.resolve()) for f in files if f.is_file() and f.suffix != ".md"]
    if named and not paths:
        fail(f"There is no file in {', '.join(map(str, named))}: name files, or folders with files.")
    return paths


def _name(trial: Trial) -> str:
    run = trial.run
    parts = [run.runtime, run.precision, *(["channels-last"] if run.channels_last else []), f"batch {run.batch}"]
    return ", ".join(parts)


def _result(trial: Trial) -> str:
    if trial.measured is None:
        return f"failed: {trial.failed}"
    return f"{trial.measured.alone_ms:.1f} ms alone, {trial.measured.together:.1f} a second together"


def _off(trial: Trial, within: float) -> str:
    if trial.measured and trial.measured.why_not:
        return "torch's own"
    text = "other answers" if math.isinf(trial.off) else f"{trial.off:.4f}"
    return text if trial.off <= within else f"[red]{text}[/]"


def _table(trials: list[Trial], winner: Trial, within: float) -> Table:
    table = Table("settings", "alone ms", "together /s", "", "off by", "load s")
    for column in table.columns[1:]:
        column.justify = "right"
    first = trials[0].measured.together if trials[0].measured else math.inf
    for trial in trials:
        measured = trial.measured
        if measured is None:
            table.add_row(_name(trial), "", "", "", "[red]failed[/]")
            continue
        times = f"{measured.together / first:.2f}x"
        numbers = (
            f"{measured.alone_ms:.1f}",
            f"{measured.together:.1f}",
            times,
            _off(trial, within),
            f"{measured.load_s:.1f}",
        )
        table.add_row(_name(trial), *numbers, style="bold green" if trial is winner else None)
    return table


def _fields(trial: Trial) -> dict[str, Any]:
    measured = trial.measured
    fields: dict[str, Any] = {"run": dataclasses.asdict(trial.run), "off": None if math.isinf(trial.off) else trial.off}
    if measured is None:
        return fields | {"failed": trial.failed}
    return fields | {key: getattr(measured, key) for key in ("load_s", "alone_ms", "together", "why_not")}
