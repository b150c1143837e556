"""Search the settings with which a handler runs fastest, among those that keep its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torchserve_dag.runtime.project.handler_file import Run
from torchserve_dag.server import json_module
from torchserve_dag.tuning.trial import Measured, Task

BATCHES = (2, 4, 8, 16)
WORTH_IT = 1.03
"""The speed-up at which a setting is preferred to an earlier, simpler one."""
TRIAL_LIMIT_S = 600

Measure = Callable[[Task], Measured]


class TrialError(Exception):
    """A trial that failed: the last line of its process's standard error."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of one set of settings."""

    run: Run
    measured: Measured | None
    off: float
    """The largest difference between a number of its answers and of plain torch's: absolute below 1, relative above;
    infinite if the answers differ in anything else."""
    failed: str = ""


def search(task: Task, *, within: float, compiled: bool, measure: Measure | None = None) -> Iterator[Trial]:
    """Run trials: first for the runtime and the precision, then for the batch size with the best of those.

    The first trial is the baseline, plain torch in float32 and one item at a time; other answers are compared with
    its answers. `best` chooses from the trials: the last is not necessarily the best.
    """
    measure = measure or in_own_process
    plain_run = replace(task.run, runtime="torch", precision="float32", channels_last=False, batch=1)
    first = measure(replace(task, run=plain_run))
    trials = [Trial(plain_run, first, 0.0)]
    yield trials[0]

    def tried(run: Run) -> Trial:
        try:
            found = measure(replace(task, run=run))
        except TrialError as error:
            trial = Trial(run, None, float("inf"), str(error))
        else:
            trial = Trial(run, found, max(map(difference, first.answers, found.answers), default=0.0))
        trials.append(trial)
        return trial

    for run in _ways(plain_run, compiled=compiled):
        yield tried(run)
    last = best(trials, within)
    for batch in BATCHES:
        trial = tried(replace(last.run, batch=batch))
        yield trial
        if trial.measured is None or last.measured is None or trial.measured.together < last.measured.together:
            return  # a larger batch would not be faster
        last = trial


def best(trials: list[Trial], within: float) -> Trial:
    """The fastest trial whose answers differ by at most `within`; of about equally fast trials, the first."""
    fit = [trial for trial in trials if trial.measured and not trial.measured.why_not and trial.off <= within]
    fastest = max(trial.measured.together for trial in fit if trial.measured)
    return next(trial for trial in fit if trial.measured and trial.measured.together * WORTH_IT >= fastest)


def _ways(run: Run, *, compiled: bool) -> Iterator[Run]:
    yield replace(run, channels_last=True)
    yield replace(run, channels_last=True, precision="bfloat16")
    if compiled:
        yield replace(run, runtime="compiled")
    yield replace(run, runtime="openvino")
    yield replace(run, runtime="openvino", precision="bfloat16")


def in_own_process(task: Task) -> Measured:
    """Run a trial in a process of its own, so that trials share no threads, compiled models or memory.

    Raises TrialError.
    """
    try:
        return json_module.call("torchserve_dag.tuning.trial", task, Measured, TRIAL_LIMIT_S)
    except json_module.ModuleFailedError as error:
        raise TrialError(str(error)) from None


def difference(one: Any, other: Any) -> float:
    """The difference between two answers; see Trial.off."""
    if isinstance(one, bool) or isinstance(other, bool) or type(one) is not type(other):
        return 0.0 if one is other else float("inf")
    if isinstance(one, dict) and one.keys() == other.keys():
        return max((difference(value, other[key]) for key, value in one.items()), default=0.0)
    if isinstance(one, list) and len(one) == len(other):
        return max(map(difference, one, other), default=0.0)
    if isinstance(one, int | float):
        return float(abs(one - other) / max(1.0, abs(one)))
    return 0.0 if one == other else float("inf")
