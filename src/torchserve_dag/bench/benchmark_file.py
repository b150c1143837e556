"""The plan of a benchmark, a TOML file: the workloads, and the number of rounds."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchserve_dag.bench import toml
from torchserve_dag.bench.errors import BenchError
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.messages import WrongFieldError

Number = int | Literal["cores"]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How the bare loop runs: its processes, the torch threads of each process, and the requests in a batch."""

    processes: Number
    threads: Number
    batch: int

    def __str__(self) -> str:
        return f"{number(self.processes)} x {number(self.threads)}, batch {self.batch}"


@dataclass(frozen=True, slots=True)
class Workload:
    """A workflow, the bodies that are sent to it, and the loads. The bodies are files, or generated."""

    name: str
    workflow: str
    """The workflow's file, relative to the plan."""
    bodies: list[str] = field(default_factory=list)
    """Files relative to the plan, sent in turn."""
    bytes: int | None = None
    """The size of one generated body."""
    mix: list[int] = field(default_factory=list)
    """For each number N, a generated body `{"objects": N}`."""
    clients: list[int] = field(default_factory=lambda: [1, 8, 32, 128])
    """The numbers of clients of the closed loops."""
    open: list[int] = field(default_factory=list)
    """The rates of the open loops, in per cent of the best closed loop of the same system and round."""
    bare: list[Arrangement] | None = None
    """The arrangements of the bare loop, if they differ from the plan's."""
    series: str = ""
    """Workloads of one series share a picture; `series` labels its x axis, and `at` is a workload's place on it."""
    at: float | None = None

    def __post_init__(self) -> None:
        if sum((bool(self.bodies), self.bytes is not None, bool(self.mix))) != 1:
            raise WrongFieldError("a workload has exactly one of bodies, bytes and mix")
        if not self.clients:
            raise WrongFieldError("a workload has at least one number of clients", "clients")
        if min(self.clients) < 1 or min(self.open, default=1) < 1:
            raise WrongFieldError("clients and open are numbers above 0")
        if bool(self.series) != (self.at is not None):
            raise WrongFieldError("series and at are given together")

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True, slots=True)
class BenchmarkFile:
    work: list[Workload]
    systems: str = "systems"
    """The folder of the programs with_*.py, relative to the plan."""
    ours: str = ""
    """The system that is highlighted: NAME of with_NAME.py."""
    rounds: int = 3
    seconds: float = 6.0
    """The length of a window."""
    warm_up: float = 2.0
    """Seconds before a system's first window."""
    settle: float = 0.5
    """Seconds before each further window."""
    bare: list[Arrangement] = field(
        default_factory=lambda: [Arrangement("cores", 1, 1), Arrangement(1, "cores", 1), Arrangement("cores", 1, 8)]
    )

    def __post_init__(self) -> None:
        names = [work.name for work in self.work]
        if not names or len(set(names)) < len(names):
            raise WrongFieldError("there is at least one workload, and no two have the same name", "work")
        if self.rounds < 1 or self.seconds <= 0:
            raise WrongFieldError("rounds and seconds are above 0")


def read(path: Path) -> BenchmarkFile:
    """The plan of a file. Raises BenchError."""
    try:
        return plain.build(BenchmarkFile, toml.parse(path.read_text("utf-8")))
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, plain.WrongDataError) as error:
        raise BenchError(f"{path}: {error}.") from None


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def number(given: Number) -> int:
    return cores() if given == "cores" else given
