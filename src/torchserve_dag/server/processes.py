"""Which processes are a server's own: its Java, its workers, and what they started."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from torchserve_dag.server.state import State, TorchServeProcess

MARK = "TORCHSERVE_DAG_STATE"
"""The environment variable that a server and all of its children have: its state folder."""


def mark(state: State) -> dict[str, str]:
    return {MARK: str(state.folder)}


def java(record: TorchServeProcess, state: State) -> psutil.Process | None:
    """TorchServe's process, if it still runs."""
    return ours(record.pid, state)


def ours(pid: int, state: State) -> psutil.Process | None:
    """A process that was started for this project, if it still runs, and its pid is not another's by now."""
    try:
        process = psutil.Process(pid)
    except psutil.Error:
        return None
    return process if alive(process) and _marked(process, state.folder) else None


def family(state: State) -> list[psutil.Process]:
    """Every process that a server of this project started, whether that server still runs or not."""
    return [process for process in psutil.process_iter() if _marked(process, state.folder) and alive(process)]


def alive(process: psutil.Process) -> bool:
    """False too for a process that has ended and that nobody has waited for: in a container nobody may."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def wait(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that are still there when all have ended, or the time is up."""
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


def _marked(process: psutil.Process, folder: Path) -> bool:
    try:
        return bool(process.environ().get(MARK) == str(folder))
    except (psutil.Error, OSError):
        return False
