"""A system under test: started, watched and stopped, with every process that it starts."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from torchserve_dag.bench.errors import BenchError
from torchserve_dag.bench.load import Grpc
from torchserve_dag.runtime.data import plain
from torchserve_dag.server.processes import alive, kill, wait

MARK = "TORCHSERVE_DAG_BENCH"
"""An environment variable that marks a system's processes, also those that leave its process group."""

_START_S = 300.0
_STOP_S = 20.0


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the server of a program listens: the line of JSON that the program prints when it serves."""

    rest: str
    headers: dict[str, str] = field(default_factory=dict)
    grpc: Grpc | None = None
    metrics: str | None = None
    """The address of its metrics, in Prometheus's format."""
    answer_ends: bool = False
    """Whether the answer is only the end of the content: a protocol's framing precedes it."""


@dataclass(frozen=True, slots=True)
class System:
    """A system that is serving."""

    serving: Endpoints
    startup_s: float
    mark: str
    program: subprocess.Popen[bytes]

    @property
    def ended(self) -> bool:
        """Whether the program has ended by itself."""
        return self.program.poll() is not None

    def processes(self) -> list[psutil.Process]:
        return _marked_by(self.mark)

    def memory_mb(self) -> float:
        """The memory of all its processes; shared pages count once (PSS)."""
        total = 0
        for process in self.processes():
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total / 1e6

    def cpu_s(self) -> float:
        """The CPU time of all its processes so far."""
        total = 0.0
        for process in self.processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total


@contextmanager
def started(python: Path, program: Path, workflow: Path, log: Path) -> Iterator[System]:
    """Start a system, and stop it at the end. Its output goes to `log`. Raises BenchError if it does not serve."""
    mark, began = uuid.uuid4().hex, time.monotonic()
    with log.open("ab") as file:
        process = subprocess.Popen(  # noqa: S603 (a program of the plan)
            [str(python), str(program), str(workflow)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=file,
            env=os.environ | {MARK: mark},
            start_new_session=True,
        )
        try:
            serving = _serving(process, log)
            yield System(serving, time.monotonic() - began, mark, process)
        finally:
            _stop(process, mark)


def _serving(process: subprocess.Popen[bytes], log: Path) -> Endpoints:
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    if process.stdout is None:
        raise AssertionError("it was started with a pipe")
    threading.Thread(target=_read, args=(process.stdout, lines, log), daemon=True).start()
    try:
        line = lines.get(timeout=_START_S)
    except queue.Empty:
        raise BenchError(f"it does not serve within {_START_S:g} s; see {log}") from None
    if not line:
        raise BenchError(f"it ended without serving: {last_line(log)}")
    try:
        return plain.build(Endpoints, json.loads(line))
    except (ValueError, plain.WrongDataError) as error:
        raise BenchError(f"the line of JSON about its server is wrong: {error}") from None


def _read(output: IO[bytes], lines: queue.SimpleQueue[bytes], log: Path) -> None:
    """Read the first line, and copy the others to the log: a full pipe would block the program."""
    lines.put(output.readline())
    with log.open("ab") as file:
        for line in output:
            file.write(line)


def last_line(log: Path) -> str:
    """The last line of a program's log, for a message."""
    lines = log.read_text("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _stop(process: subprocess.Popen[bytes], mark: str) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + _STOP_S
    while (left := _marked_by(mark)) and time.monotonic() < deadline:  # a process may have started another meanwhile
        kill(left)
        wait(left, 1.0)


def _marked_by(mark: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _marked(process, mark)]


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return alive(process) and process.environ().get(MARK) == mark
    except psutil.Error:
        return False
