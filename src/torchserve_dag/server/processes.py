"""The processes of a server: started, found again, waited for, ended."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import ServerRecord, State

MARK = "TORCHSERVE_DAG_STATE"
"""An environment variable with the state folder; every process of a server inherits it."""


_children: list[subprocess.Popen[bytes]] = []
"""The processes that this one started, so that those that have ended are reaped."""


def mark(state: State) -> dict[str, str]:
    return {MARK: str(state.folder)}


def spawn(
    command: Sequence[str],
    state: State,
    *,
    cwd: Path | None = None,
    stdout: int | None = subprocess.DEVNULL,
    blocked: Collection[signal.Signals] = (),
    environment: Mapping[str, str] | None = None,
) -> int:
    """Start a process of this server, and return its pid.

    It has a session of its own, outlives the process that started it, and does not get the `blocked` signals.
    """
    _children[:] = [child for child in _children if child.poll() is None]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)  # a new process inherits the mask
    try:
        child = subprocess.Popen(  # noqa: S603 (our own arguments)
            list(command),
            cwd=cwd,
            env={**os.environ, **mark(state), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stdout,
            start_new_session=True,
            umask=0o077,  # its logs are its owner's only
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _children.append(child)
    return child.pid


def ticks(pid: int) -> int:
    """When a process started, in clock ticks since the machine did (nobody sets that clock); 0 if there is none."""
    return _state_and_ticks(pid)[1]


def still_runs(pid: int, since_ticks: int) -> bool:
    """Whether the process that had this pid when it started at that time still runs, at little cost."""
    state, started = _state_and_ticks(pid)
    return started == since_ticks > 0 and state not in "ZX"


def workers_run(state: State) -> bool:
    """Whether a worker of the direct host runs, by the records of stack/worker_process.py."""
    for path in (state.direct / "workers").glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(path.read_text("utf-8"))
            if still_runs(record["pid"], record["ticks"]):
                return True
    return False


def _state_and_ticks(pid: int) -> tuple[str, int]:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return "X", 0
    fields = stat.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def java(record: ServerRecord, state: State) -> psutil.Process | None:
    """TorchServe's process, if it still runs."""
    return ours(record.pid, state)


def ours(pid: int, state: State) -> psutil.Process | None:
    """The process with this pid, if it was started for this project: a pid may have been reused."""
    try:
        process = psutil.Process(pid)
        ours = _marked(process, state.folder)
    except (psutil.Error, OSError):
        return None
    return process if ours and alive(process) else None


def family(state: State, besides: Collection[int] = ()) -> list[psutil.Process]:
    """Every process that was started by a server of this project and still runs, without those of these pids."""
    everybody = (process for process in psutil.process_iter() if process.pid not in besides)
    return [process for process in everybody if _marked(process, state.folder) and alive(process)]


def workers_of(java: psutil.Process, ids: frozenset[str]) -> set[int]:
    """The pids of the workers with these ids among TorchServe's child processes."""
    workers: set[int] = set()
    try:
        children = java.children(recursive=True) if ids else []
    except psutil.Error:
        return workers
    for child in children:
        try:
            words = child.cmdline()
        except psutil.Error:
            continue
        names = [after for word, after in itertools.pairwise(words) if word in {"--sock-name", "--port"}]
        if any(name.rpartition(".")[2] in ids for name in names):
            workers.add(child.pid)
    return workers


def alive(process: psutil.Process) -> bool:
    """Whether a process runs. A zombie does not: in a container without init nobody reaps it."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def runs(pid: int) -> bool:
    """Whether a process with this pid runs."""
    try:
        return pid > 0 and alive(psutil.Process(pid))
    except psutil.Error:
        return False


def wait(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait for the processes to end; those that still run after the timeout."""
    deadline = time.monotonic() + timeout_s
    left = [process for process in processes if alive(process)]
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [process for process in left if alive(process)]
    return left


def kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            continue


def end_family(state: State, besides: Collection[int] = ()) -> bool:
    """End every process of the project's server that still runs, but those of these pids. Returns whether any did.

    Raises ServerError if one does not end.
    """
    family_left = family(state, besides)
    kill(left := wait(family_left, 1.0))
    if wait(left, 5.0):
        pids = ", ".join(str(survivor.pid) for survivor in left)
        raise ServerError(f"These processes of the server do not end: {pids}.")
    return bool(family_left)


def _marked(process: psutil.Process, folder: Path) -> bool:
    try:
        return bool(process.environ().get(MARK) == str(folder))
    except (psutil.Error, OSError):
        return False
