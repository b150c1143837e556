"""One trial: a handler under one set of `run:` settings, measured in a process of its own.

`python -m torchserve_dag.tuning.trial` reads a Task as JSON and writes a Measured.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchserve_dag.runtime.compute import cores
from torchserve_dag.runtime.compute.openvino import OpenVinoModel
from torchserve_dag.runtime.data import codec, plain
from torchserve_dag.runtime.handler import types_of
from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.models.load import load_handler
from torchserve_dag.runtime.models.stages import Stages
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.project.handler_file import Run
from torchserve_dag.server import json_module

MOST_ALONE = 200


@dataclass(frozen=True, slots=True)
class Task:
    """A handler, its settings, and the items to measure it with."""

    project: str
    handler: str
    """The handler's YAML file."""
    run: Run
    bodies: list[str]
    """Files, each a request's body; empty for the handler's own example."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements of one trial."""

    load_s: float
    alone_ms: float
    """Median latency of one item at a time, which may use every core."""
    together: float
    """Throughput in items per second with one thread per core, each running batches, as in a worker under load."""
    answers: list[Any]
    """The answer to each item, as plain data."""
    why_not: str = ""
    """Why torch ran the model instead of the requested runtime; empty if it did not."""


def measure(task: Task) -> Measured:
    """Run one trial. Raises CheckError, ValueError or RuntimeError if the handler does not load or rejects an item."""
    project = Project(Path(task.project))
    file = project.read_handler(Path(task.handler))
    file = dataclasses.replace(file, value=dataclasses.replace(file.value, run=task.run))
    lanes = cores.cores()
    cores.share_cores(lanes)
    begin = time.perf_counter()
    stages = load_handler(project, file, lanes=lanes)
    if not isinstance(stages, Stages):
        raise TypeError(f"{stages.name} has an engine of its own, which batches by itself")
    load_s = time.perf_counter() - begin
    if stages.placement.device.type != "cpu":
        lanes = 1
    takes, _ = types_of(type(stages.handler))
    items = [codec.decode(takes, Path(body).read_bytes()) for body in task.bodies] or [stages.handler.example()]
    answers = stages(items)
    for answer in answers:
        if isinstance(answer, Failure):
            raise ValueError(f"{stages.name} rejects an item: {answer.message}")  # noqa: TRY004 (a value)
    return Measured(
        round(load_s, 2),
        _alone_ms(stages, items, task.seconds),
        _together(stages, items, lanes, task.run.batch, task.seconds),
        [plain.flatten(answer) for answer in answers],
        next((m.why_not for m in vars(stages.handler).values() if isinstance(m, OpenVinoModel)), ""),
    )


def _alone_ms(stages: Stages, items: list[Any], seconds: float) -> float:
    cores.set_alone(True)
    times: list[float] = []
    end = time.perf_counter() + seconds
    for i in range(MOST_ALONE):
        begin = time.perf_counter()
        if begin > end and times:
            break
        stages([items[i % len(items)]])
        times.append(time.perf_counter() - begin)
    cores.set_alone(False)
    return round(statistics.median(times) * 1000, 2)


def _together(stages: Stages, items: list[Any], lanes: int, batch: int, seconds: float) -> float:
    """The sum of the throughput of all threads, each of which runs batches until the time is over."""

    def lane(start: int) -> float:
        done = start
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            stages([items[(done + i) % len(items)] for i in range(batch)])
            done += batch
        return (done - start) / (time.perf_counter() - begin)

    with ThreadPoolExecutor(lanes) as threads:
        return round(sum(threads.map(lane, range(lanes))), 2)


if __name__ == "__main__":
    json_module.serve(Task, measure)
