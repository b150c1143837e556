"""The watcher, the outermost process of a project's server: it starts the keeper again whenever that has ended.

`torchserve-dag up --foreground` becomes this process. On SIGTERM it has the keeper end everything, waits, and ends. The
keeper watches it in turn, so that either alone may be killed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType

from torchserve_dag.server import processes
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State
from torchserve_dag.server.supervised import ROLES, Supervised
from torchserve_dag.stack import supervise
from torchserve_dag.stack.watch import Watch

logger = logging.getLogger(__name__)

LOG = "watcher.log"
END_TRIES = 3
"""How many keepers may be started to end everything."""


class Watcher:
    """The watcher of one project."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.supervised = Supervised(state)
        self._ending = threading.Event()

    def run(self) -> None:
        """Watch until `end` is called or the server is to be stopped; then see that everything has ended."""
        keeper = Watch(self.supervised, "keeper", lambda: supervise.start_keeper(self.state))
        while not self._ending.wait(supervise.POLL_S) and self.state.serving():
            _reap()
            self._stay_recorded()
            keeper.look()
        self.state.forget_serving()
        self._finish()

    def end(self, _signal: int, _frame: FrameType | None) -> None:
        """The handler of SIGTERM."""
        self._ending.set()

    def _finish(self) -> None:
        tries = 0
        pause = threading.Event()
        while True:
            _reap()
            if self.supervised.process("keeper") is None:
                left = any(
                    self.supervised.process(role) for role in ROLES if role in {"Envoy", "gateway", "TorchServe"}
                )
                if not (left or processes.workers_run(self.state)) or tries == END_TRIES:
                    return
                tries += 1
                supervise.start_keeper(self.state)  # which finds that nothing is to be served, and ends what runs
            pause.wait(supervise.POLL_S)

    def _stay_recorded(self) -> None:
        """Another watcher may have been started at the same time, and recorded before it found that it is not alone."""
        record = self.supervised.record("watcher")
        if record is None or record.pid != os.getpid():
            with suppress(OSError):
                self.supervised.started("watcher", os.getpid())


def _reap() -> None:
    """In a container this may be process 1, which inherits every process whose parent has ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _take_over(state: State) -> None:
    """End a watcher that the keeper started when the foreground one was gone."""
    other = Supervised(state).process("watcher")
    if other and other.pid != os.getpid():
        logger.info("takes over from the watcher with pid %d", other.pid)
        other.kill()


def main(state: State, *, foreground: bool) -> None:
    supervise.log_to(state, LOG)
    watcher = Watcher(state)
    signal.signal(signal.SIGTERM, watcher.end)
    signal.signal(signal.SIGINT, watcher.end if foreground else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    for left in reversed(range(5 if foreground else 1)):
        if foreground:
            _take_over(state)
        try:
            with supervise.alone(state, "watcher"):
                watcher.run()
            break
        except ServerError as error:
            if not left:
                sys.exit(str(error))
