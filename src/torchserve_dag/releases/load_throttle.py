"""A new version's workers load their model while cores are idle, so that those who are served hardly feel it.

A process may lower its own priority, but needs a privilege to raise it again. So the new workers are stopped and let go
on (SIGSTOP, SIGCONT), slice by slice of time, as there is a core that nothing else wants, until all of them are ready.
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

SLICE_S = 0.01
"""So long a worker goes on at a time. Where its core is wanted meanwhile, the two share it."""
SETTLE_S = 0.001
"""So long a process may take to stop."""
OWED = 10
"""Of so many slices in which no core is idle, a worker gets one."""
LOOK_EVERY_S = 0.25
WITHIN_S = 100.0
"""After this time they are left alone: TorchServe ends a worker that does not speak within two minutes."""


class LoadThrottle:
    """While it is entered, the workers that it holds compute where a core is idle."""

    def __init__(self, java: psutil.Process) -> None:
        """`java` is the process of TorchServe, whose children workers are."""
        self._java = java
        self._ids: frozenset[str] = frozenset()
        self._workers: dict[int, int] = {}
        """A descriptor of each, by its pid; whose turn it is comes first."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gently", daemon=True)

    def assign(self, ids: Iterable[str]) -> None:
        """These are the workers, by TorchServe's ids, and no others any more."""
        self._ids = frozenset(ids)

    def __enter__(self) -> LoadThrottle:
        atexit.register(self._end)  # or whom it stopped would stay so
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
        end, look_at, busy = time.monotonic() + WITHIN_S, 0.0, 0
        try:
            while not self._over.is_set() and time.monotonic() < end:
                if time.monotonic() >= look_at:
                    look_at = time.monotonic() + LOOK_EVERY_S
                    self._take(workers_of(self._java, self._ids))
                self._send(signal.SIGSTOP, self._workers)
                time.sleep(SETTLE_S)
                idle = idle_cores()
                if idle > len(self._workers):
                    self._send(signal.SIGCONT, self._workers)
                    self._over.wait(LOOK_EVERY_S)
                    continue
                busy = 0 if idle else busy + 1
                self._send(signal.SIGCONT, list(self._workers)[: idle or int(busy % OWED == 0)])
                self._over.wait(SLICE_S)
        finally:
            self._take(set())

    def _take(self, pids: set[int]) -> None:
        """These and no others: whom it stopped before may go on. The next one comes first."""
        for pid in list(self._workers)[:1]:
            self._workers[pid] = self._workers.pop(pid)
        left = self._workers.keys() - pids
        self._send(signal.SIGCONT, left)
        for pid in left:
            os.close(self._workers.pop(pid))
        for pid in pids - self._workers.keys():
            with suppress(OSError):  # it has ended
                self._workers[pid] = os.pidfd_open(pid)

    def _send(self, what: signal.Signals, pids: Iterable[int]) -> None:
        for pid in pids:
            with suppress(OSError):
                signal.pidfd_send_signal(self._workers[pid], what)


def idle_cores() -> int:
    """Cores for which nothing is ready to run, but the thread that asks."""
    ready = Path("/proc/loadavg").read_text("ascii").split()[3].partition("/")[0]
    return max(0, (os.cpu_count() or 1) - int(ready) + 1)


def workers_of(java: psutil.Process, ids: frozenset[str]) -> set[int]:
    """The pids of TorchServe's processes that are these workers."""
    found: set[int] = set()
    try:
        children = java.children(recursive=True) if ids else []
    except psutil.Error:
        return found
    for child in children:
        try:
            words = child.cmdline()
        except psutil.Error:
            continue
        names = [after for word, after in itertools.pairwise(words) if word in {"--sock-name", "--port"}]
        if any(name.rpartition(".")[2] in ids for name in names):
            found.add(child.pid)
    return found
