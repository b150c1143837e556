"""Throttle the workers of a version that is loading: they run while cores are idle, so that serving is not slowed down.

An unprivileged process can lower its priority but not raise it again. So the loading workers are stopped and continued
(SIGSTOP, SIGCONT) in short time slices, depending on idle cores, until all of them are ready.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

from torchserve_dag.server.processes import workers_of

SLICE_S = 0.01
"""How long a worker runs until the idle cores are counted again; meanwhile it may compete with serving for its core."""
SETTLE_S = 0.001
"""How long after SIGSTOP a process may still be running on its core."""
BUSY_SLICES = 10
"""With no idle core, run a loading worker in 1 slice of 10."""
CHECK_EVERY_S = 0.25
LONGEST_S = 100.0
"""How long workers are throttled: TorchServe kills a worker that does not respond within two minutes."""


class LoadThrottle:
    """A context in which the assigned workers run only while cores are idle."""

    def __init__(self, java: psutil.Process) -> None:
        """`java` is TorchServe's process, the parent of its workers."""
        self._java = java
        self._ids: frozenset[str] = frozenset()
        self._workers: dict[int, psutil.Process] = {}
        """The workers by their pids, in round-robin order."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load-throttle", daemon=True)

    def assign(self, ids: Iterable[str]) -> None:
        """Throttle exactly these workers, named by TorchServe's worker ids; others run freely again."""
        self._ids = frozenset(ids)

    def __enter__(self) -> LoadThrottle:
        # A keeper that ends must not leave workers stopped; after a keeper that is killed, the next one continues them.
        atexit.register(self._end)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        atexit.unregister(self._end)
        self._end()

    def _end(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        end, look_at, busy = time.monotonic() + LONGEST_S, 0.0, 0
        try:
            while not self._over.is_set() and time.monotonic() < end:
                if time.monotonic() >= look_at:
                    look_at = time.monotonic() + CHECK_EVERY_S
                    self._track(workers_of(self._java, self._ids))
                self._send(signal.SIGSTOP, self._workers)
                time.sleep(SETTLE_S)
                idle = idle_cores()
                if idle > len(self._workers):
                    self._send(signal.SIGCONT, self._workers)
                    self._over.wait(CHECK_EVERY_S)
                    continue
                busy = 0 if idle else busy + 1
                self._send(signal.SIGCONT, list(self._workers)[: idle or int(busy % BUSY_SLICES == 0)])
                self._over.wait(SLICE_S)
        finally:
            self._track(set())

    def _track(self, pids: set[int]) -> None:
        """Throttle exactly these processes, continue all others, and advance the round-robin by one."""
        for pid in list(self._workers)[:1]:
            self._workers[pid] = self._workers.pop(pid)
        left = self._workers.keys() - pids
        self._send(signal.SIGCONT, left)
        for pid in left:
            del self._workers[pid]
        for pid in pids - self._workers.keys():
            with suppress(psutil.Error):  # the process has ended
                self._workers[pid] = psutil.Process(pid)

    def _send(self, kind: signal.Signals, pids: Iterable[int]) -> None:
        for pid in pids:
            with suppress(psutil.Error):
                self._workers[pid].send_signal(kind)


def idle_cores() -> int:
    """The number of cores without a runnable thread, apart from the calling one."""
    ready = Path("/proc/loadavg").read_text("ascii").split()[3].partition("/")[0]
    return max(0, (os.cpu_count() or 1) - int(ready) + 1)
