"""The two processes that keep a project's server running, and each other: the keeper and the watcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from typing import NoReturn

from torchserve_dag.runtime.logs import Formatter
from torchserve_dag.server import processes
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State, locked
from torchserve_dag.server.supervised import Role, Supervised

PROGRAM = (sys.executable, "-m", "torchserve_dag.stack")
FOREGROUND = "--foreground"
LOG_BYTES = 2 * 2**20
POLL_S = 0.1
"""The pause between two looks at a process."""


def start_keeper(state: State, *, stdout: int | None = None) -> None:
    """Start the keeper. `stdout`: None for that of this process."""
    pid = processes.spawn([*PROGRAM, "keeper", str(state.folder.parent)], state, stdout=stdout)
    Supervised(state).started("keeper", pid)


def start(state: State) -> None:
    """Start the watcher, if it does not run; it starts the keeper."""
    if Supervised(state).process("watcher") is None:
        start_watcher(state)


def check_mendable(state: State, *, foreground: bool) -> None:
    """Raises ServerError if `up` has nothing to do: every process is well, or one in the foreground watches already."""
    supervised = Supervised(state)
    watcher = supervised.process("watcher")
    whole = not any(one.problem for one in supervised.report())
    if watcher and (FOREGROUND in watcher.cmdline() if foreground else whole):
        raise ServerError(
            f"A server of this project is running already (pid {watcher.pid}): stop it with torchserve-dag down."
        )


def watcher_pid(state: State) -> int:
    record = Supervised(state).record("watcher")
    return record.pid if record else 0


def start_watcher(state: State) -> None:
    pid = processes.spawn([*PROGRAM, "watcher", str(state.folder.parent)], state)
    Supervised(state).started("watcher", pid)


def become_watcher(state: State) -> NoReturn:
    """Turn this process into the watcher, which logs to its standard output."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until the watcher handles it
    command = [*PROGRAM, "watcher", str(state.folder.parent), FOREGROUND]
    os.execve(sys.executable, command, {**os.environ, **processes.mark(state)})  # noqa: S606


def wait_until_whole(state: State, timeout_s: float, show: Callable[[str], None] | None = None) -> None:
    """Wait until every process runs and is well. Raises ServerError with what is wrong if that takes too long."""
    deadline = time.monotonic() + timeout_s
    while problems := [one.problem for one in Supervised(state).report() if one.problem]:
        if time.monotonic() > deadline:
            raise ServerError(" ".join(problems))
        if show:
            show(problems[0])
        time.sleep(POLL_S)


@contextmanager
def alone(state: State, role: Role) -> Iterator[None]:
    """Be the project's only keeper or watcher, recorded as such. Raises ServerError if there is another."""
    state.processes.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(state.folder / f"{role}.lock", 2.0, f"Another {role} of this project is running."):
        Supervised(state).started(role, os.getpid())
        yield


def log_to(state: State, name: str) -> None:
    """Log to a file of bounded size, and to the standard output."""
    state.logs.mkdir(parents=True, exist_ok=True)
    file = RotatingFileHandler(state.logs / name, maxBytes=LOG_BYTES, backupCount=1)
    handlers: list[logging.Handler] = [file, logging.StreamHandler(sys.stdout)]
    for handler in handlers:
        handler.setFormatter(Formatter(logging.Formatter("%(asctime)s [%(levelname)s] %(name)s - %(message)s")))
    logging.basicConfig(handlers=handlers, level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.raiseExceptions = False  # whoever read the standard output may have gone
