"""`torchserve-dag bench`: compare this engine with other servers under the same workloads."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from torchserve_dag.archives import atomic
from torchserve_dag.commands.common import JsonOption, ProjectOption, err, fail, failures, out, print_json, project_root

if TYPE_CHECKING:
    from torchserve_dag.bench.benchmark_file import BenchmarkFile
    from torchserve_dag.bench.benchmark_run import BenchmarkRun
    from torchserve_dag.bench.summary import Summary

_PLAN = Path("loadtests", "bench.toml")
_RESULTS = Path("loadtests", "results")
_ENVIRONMENTS = ".venv-bench"


def bench(
    plan: Annotated[
        Path | None,
        typer.Argument(metavar="PLAN", help=f"The benchmark's TOML file; by default {_PLAN}.", show_default=False),
    ] = None,
    *,
    only: Annotated[
        list[str] | None, typer.Option(metavar="WORK", help="Only workloads whose name contains this; may be repeated.")
    ] = None,
    systems: Annotated[
        str, typer.Option(metavar="A,B", help="Only these systems and the bare loop; by default all.")
    ] = "",
    rounds: Annotated[int | None, typer.Option(min=1, help="Number of rounds; by default as in the file.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Duration of a measurement; by default as in the file.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help=f"Folder of the results; by default {_RESULTS}/DATE.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out, with the settings it was started with.")
    ] = False,
    report_only: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Measure nothing; write the report of the results in DIR.")
    ] = None,
    json: JsonOption = False,
    project: ProjectOption = None,
) -> None:
    """Measure every system under the same workloads, interleaved, and write a report with tables and plots."""
    with failures(), _bench_failures():
        if report_only:
            folder = report_only
        else:
            root = project_root(project)
            folder = results or root / _RESULTS / time.strftime("%Y-%m-%d-%H%M")
            if resume and results is None:
                fail("Name the run to continue: --resume --out DIR.")
            file = plan or root / _PLAN
            run = _run(folder, file, only or [], systems, rounds, seconds, resume=resume)
            _measure(run, folder, root / _ENVIRONMENTS)
        summary = _report(folder)
    if json:
        print_json(summary)
    else:
        out.print(f"wrote {folder / 'report.md'}", markup=False, soft_wrap=True)


@contextmanager
def _bench_failures() -> Iterator[None]:
    from torchserve_dag.bench.errors import BenchError

    try:
        yield
    except BenchError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("Stopped. Continue with --resume --out, or report what was measured with --report-only.")


def _run(
    folder: Path, file: Path, only: list[str], systems: str, rounds: int | None, seconds: float | None, *, resume: bool
) -> BenchmarkRun:
    """The run to measure: a new one, or the one to resume."""
    from torchserve_dag.bench import benchmark_file, machine, programs
    from torchserve_dag.bench.benchmark_run import BenchmarkRun

    if resume:
        return BenchmarkRun.read(folder)
    if (folder / "results.jsonl").exists():
        fail(f"{folder} has results already: continue them with --resume, or name another folder with --out.")
    found = _only(benchmark_file.read(file), only)
    found = replace(found, rounds=rounds or found.rounds, seconds=seconds or found.seconds)
    keys = [key.strip() for key in systems.split(",") if key.strip()]
    chosen = programs.chosen(programs.find(file.parent / found.systems), keys)
    run = BenchmarkRun(time.strftime("%d %B %Y"), machine.this(), found, os.path.relpath(file), chosen)
    run.write(folder)
    return run


def _only(plan: BenchmarkFile, parts: list[str]) -> BenchmarkFile:
    works = [work for work in plan.work if not parts or any(part.lower() in work.name.lower() for part in parts)]
    if not works:
        fail(
            f"No workload has {' or '.join(parts)} in its name; there are {', '.join(work.name for work in plan.work)}."
        )
    return replace(plan, work=works)


def _measure(run: BenchmarkRun, folder: Path, environments: Path) -> None:
    if find_spec("httptools") is None:
        fail("The load generator needs httptools, which is missing: pip install 'torchserve-dag[bench]'.")
    from torchserve_dag.bench.measure import Benchmark, measure

    benchmark = Benchmark(run.plan, Path(run.plan_file).parent, run.programs, environments, folder)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("preparing", total=None)
        measure(
            benchmark,
            lambda what, done, total: bar.update(task, description=escape(what), completed=done, total=total),
        )


def _report(folder: Path) -> Summary:
    from torchserve_dag.bench import plots, report, rows
    from torchserve_dag.bench.benchmark_run import BenchmarkRun
    from torchserve_dag.bench.errors import BenchError
    from torchserve_dag.bench.summary import summarise

    summary = summarise(BenchmarkRun.read(folder), rows.read(folder / "results.jsonl"))
    try:
        pictures = plots.draw(summary, folder)
    except BenchError as error:  # a report without plots is better than none
        err.print(f"[yellow]{escape(str(error))}[/]", soft_wrap=True)
        pictures = {}
    atomic.write_text(folder / "report.md", report.markdown(summary, pictures))
    return summary
