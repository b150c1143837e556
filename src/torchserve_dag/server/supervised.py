"""The records of the processes that serve a project: which run, which have ended and why, and what follows."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import Literal

import psutil

from torchserve_dag.archives import atomic
from torchserve_dag.runtime.data import plain
from torchserve_dag.server import processes
from torchserve_dag.server.state import State

Role = Literal["watcher", "keeper", "Envoy", "gateway", "TorchServe"]
ROLES: tuple[Role, ...] = ("watcher", "keeper", "Envoy", "gateway", "TorchServe")
WATCHED_BY: dict[Role, Role] = {role: "watcher" if role == "keeper" else "keeper" for role in ROLES}
AGAIN = "torchserve-dag up starts what is missing, and leaves alone what runs"


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """A process that was started."""

    pid: int
    ticks: int
    """When it started, in clock ticks since the machine did: tells it from a later process with the same pid."""
    since: float
    """The same in seconds since 1970."""
    problem: str = ""
    """What is wrong with it, in words that follow its name; empty while nothing is."""


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    name: Role
    pid: int
    running: bool
    since: float
    problem: str
    """What is wrong, since when, why, and what follows: one sentence; empty while nothing is."""


class Supervised:
    """The records of a project's processes, one file for each, in the state folder."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.folder = state.processes

    def record(self, role: Role) -> ProcessRecord | None:
        """The process that was started last, whether it still runs or not."""
        try:
            return plain.build(ProcessRecord, json.loads((self.folder / f"{role}.json").read_text("utf-8")))
        except (OSError, ValueError, plain.WrongDataError):
            return None

    def started(self, role: Role, pid: int, problem: str = "") -> None:
        self._save(role, ProcessRecord(pid, processes.ticks(pid), time.time(), problem))

    def note(self, role: Role, problem: str) -> None:
        """Record what is wrong with a process; an empty text if nothing is."""
        record = self.record(role)
        if record and record.problem != problem:
            self._save(role, replace(record, problem=problem))

    def process(self, role: Role) -> psutil.Process | None:
        """The process, if it runs."""
        record = self.record(role)
        if record is None or not processes.still_runs(record.pid, record.ticks):
            return None
        try:
            return psutil.Process(record.pid)
        except psutil.Error:  # it has just ended
            return None

    def report(self) -> list[ProcessStatus]:
        """Every process that should run; none if the server was not started, or was stopped."""
        serving = self.state.serving()
        if serving is None:
            return []
        absent = {"TorchServe"} if serving.host == "direct" else set() if serving.envoy else {"Envoy", "gateway"}
        return [self._status(role) for role in ROLES if role not in absent]

    def problem(self, role: Role) -> str:
        """What is wrong with a process that should run; empty if nothing is, or if it should not run."""
        return next((one.problem for one in self.report() if one.name == role), "")

    def _status(self, role: Role) -> ProcessStatus:
        record, running = self.record(role) or ProcessRecord(0, 0, 0.0), self.process(role) is not None
        problem = ""
        if not running or record.problem:
            which = f"{role} (pid {record.pid})" if record.pid else role
            problem = f"{which} {record.problem or 'has ended'}; {self._next(role, running=running)}."
        return ProcessStatus(role, record.pid, running, record.since, problem)

    def _next(self, role: Role, *, running: bool) -> str:
        by = WATCHED_BY[role]
        if running:
            return "requests get 503 until it is ready" if role == "TorchServe" else "wait a moment"
        if self.process(by):
            return f"the {by} starts it again"
        if by == "keeper" and role != "watcher" and self.process("watcher"):
            return "the watcher starts the keeper again, which starts it"
        return AGAIN

    def _save(self, role: Role, record: ProcessRecord) -> None:
        atomic.write_private(self.folder / f"{role}.json", json.dumps(plain.flatten(record)))
