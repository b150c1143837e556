"""Measures every system in rounds: figures that are compared with one another are measured close in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torchserve_dag.bench import bare_loop, environments, rows
from torchserve_dag.bench.benchmark_file import Arrangement, BenchmarkFile, Workload
from torchserve_dag.bench.bodies import prepare
from torchserve_dag.bench.errors import BenchError
from torchserve_dag.bench.loads import Loads
from torchserve_dag.bench.programs import BARE, Program
from torchserve_dag.bench.rows import BareRow, SystemRow
from torchserve_dag.bench.systems import started
from torchserve_dag.bench.window import percentiles

T = TypeVar("T")
Show = Callable[[str, int, int], None]
"""Called with the current step, the number of steps done, and the number of all steps."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What is measured, and the folders that it uses."""

    plan: BenchmarkFile
    base: Path
    """The plan's folder; the paths in the plan are relative to it."""
    programs: list[Program]
    environments: Path
    """The folder of the systems' virtual environments."""
    out: Path
    """The folder of the results."""

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"


@dataclass(slots=True)
class _Steps:
    """The steps of a benchmark, one for each (round, work, program or arrangement), and how many are done."""

    benchmark: Benchmark
    pythons: dict[str, Path]
    bodies: dict[str, list[Path]]
    show: Show
    total: int = 0
    done: int = 0
    known: set[tuple[int, str, str]] = field(default_factory=set)
    """The steps that an earlier run has measured."""

    def say(self, text: str) -> None:
        self.show(text, self.done, self.total)


def measure(benchmark: Benchmark, show: Show) -> None:
    """Measure what is missing in the results, and append each row when it is measured.

    Raises BenchError if a workload's bodies or workflow are missing, or an environment cannot be made. A system that
    does not start, or ends while it is measured, gets a row with that problem.
    """
    steps = _prepared(benchmark, show)
    for number in range(1, benchmark.plan.rounds + 1):
        for work in benchmark.plan.work:
            for step in rotated(_steps_of(benchmark, work), number - 1):
                name = step.key if isinstance(step, Program) else str(step)
                if (number, work.name, name) not in steps.known:
                    title = f"round {number} of {benchmark.plan.rounds}: {work.name}: "
                    if isinstance(step, Program):
                        _measure_system(steps, number, work, step, title + step.name)
                    else:
                        _measure_bare(steps, number, work, step, f"{title}bare loop, {step}")
                steps.done += 1


def rotated(items: Sequence[T], by: int) -> list[T]:
    """The items in another order for each round: no system is always first, when the machine is cool."""
    first = by % len(items) if items else 0
    return [*items[first:], *items[:first]]


def _steps_of(benchmark: Benchmark, work: Workload) -> list[Program | Arrangement]:
    steps: list[Program | Arrangement] = []
    for program in benchmark.programs:
        steps += (work.bare or benchmark.plan.bare) if program.key == BARE else [program]
    return steps


def _prepared(benchmark: Benchmark, show: Show) -> _Steps:
    generated = benchmark.out / "bodies"
    bodies = {work.name: prepare(work, benchmark.base, generated) for work in benchmark.plan.work}
    for work in benchmark.plan.work:
        if not (benchmark.base / work.workflow).is_file():
            raise BenchError(
                f'{benchmark.base / work.workflow}, the workflow of the workload "{work.name}", does not exist.'
            )
    pythons = {}
    for number, program in enumerate(benchmark.programs):
        show(f"environment of {program.name}", number, len(benchmark.programs))
        pythons[program.key] = environments.python_for(program, benchmark.environments)
    steps = _Steps(benchmark, pythons, bodies, show)
    if benchmark.results.exists():
        kept = rows.complete(rows.read(benchmark.results))
        rows.write(benchmark.results, kept)
        steps.known = {
            (row.round, row.work, row.arrangement if isinstance(row, BareRow) else row.system) for row in kept
        }
    (benchmark.out / "logs").mkdir(exist_ok=True)
    steps.total = benchmark.plan.rounds * sum(len(_steps_of(benchmark, work)) for work in benchmark.plan.work)
    return steps


def _log(benchmark: Benchmark, number: int, work: Workload, name: str) -> Path:
    return benchmark.out / "logs" / f"{work.slug}-{name}-{number}.log"


def _program(benchmark: Benchmark, key: str) -> Program:
    return next(program for program in benchmark.programs if program.key == key)


def _measure_bare(steps: _Steps, number: int, work: Workload, arrangement: Arrangement, title: str) -> None:
    benchmark, log = steps.benchmark, _log(steps.benchmark, number, work, BARE)
    steps.say(title)
    command = [str(steps.pythons[BARE]), _program(benchmark, BARE).path]
    folder = steps.bodies[work.name][0].parent
    try:
        found = bare_loop.run(command, benchmark.base / work.workflow, folder, arrangement, benchmark.plan.seconds, log)
    except BenchError as error:
        row = BareRow(number, work.name, str(arrangement), problem=str(error))
    else:
        latency = percentiles([ms / 1e3 for ms in found.latencies_ms])
        row = BareRow(
            number,
            work.name,
            str(arrangement),
            rps=found.requests / found.seconds,
            p50_ms=latency.p50 if latency else None,
            p99_ms=latency.p99 if latency else None,
            memory_mb=found.memory_mb,
            startup_s=found.startup_s,
        )
    rows.append(benchmark.results, [row])


def _measure_system(steps: _Steps, number: int, work: Workload, program: Program, title: str) -> None:
    benchmark, log = steps.benchmark, _log(steps.benchmark, number, work, program.key)
    steps.say(f"{title}: starting")
    startup_s = memory_mb = problem = None
    try:
        with started(steps.pythons[program.key], Path(program.path), benchmark.base / work.workflow, log) as system:
            startup_s = system.startup_s
            loads = Loads(benchmark.plan, number, work, program, system, steps.bodies[work.name], log)
            for what, row in loads.run():
                steps.say(f"{title}: {what}")
                if row is not None:
                    rows.append(benchmark.results, [row])
            memory_mb = system.memory_mb()
    except BenchError as error:
        problem = str(error)
    rows.append(benchmark.results, [SystemRow(number, work.name, program.key, startup_s, memory_mb, problem)])
