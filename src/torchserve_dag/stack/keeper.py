"""The keeper, a process beside the front door: it restarts Envoy if Envoy ends, ejects versions that keep failing for a
while, and runs rollouts without a terminal.

    python -m torchserve_dag.stack.keeper PROJECT

On SIGTERM it drains the front door, and then ends Envoy and TorchServe: no accepted request is lost.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType

from torchserve_dag.front_door.door import Door
from torchserve_dag.front_door.envoy import Envoy
from torchserve_dag.front_door.envoy_config import GUARDED, PROTOCOLS, cluster_name
from torchserve_dag.releases.rollout import Rollouts
from torchserve_dag.server import processes
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State

logger = logging.getLogger(__name__)

LOOK_S = 0.5
"""The pause between two rounds of the keeper's steps."""
LOG, LOG_BYTES = "front_door_keeper.log", 2 * 2**20
PAUSES_S = (0, 1, 1, 2, 3, 5)
"""Seconds before each restart of Envoy; the last pause is repeated."""


class Keeper:
    """The keeper of one project."""

    def __init__(self, root: Path) -> None:
        self.state = State(root)
        self.door = Door(self.state)
        self.rollouts = Rollouts(root)
        self._ending = threading.Event()
        self._shown: tuple[bytes, bytes] | None = None

    def run(self) -> None:
        """Runs until `end` is called."""
        envoy, ends = Envoy(self.state), 0
        self.rollouts.store.forget_running()
        while not self._ending.wait(LOOK_S):
            if envoy.ended() is not None:
                logger.warning("Envoy ended with %s and is restarted", envoy.ended())
                self._ending.wait(PAUSES_S[min(ends, len(PAUSES_S) - 1)])
                ends += 1
                _try(envoy.start)
                continue
            for step in (envoy.rotate_logs, self.renew, self.eject, self.rollouts.start_requested):
                _try(step)
        self.rollouts.store.forget_running()
        envoy.end()
        record = self.state.record()
        java = processes.java(record, self.state) if record else None
        if java:
            java.terminate()

    def end(self, _signal: int, _frame: FrameType | None) -> None:
        """The handler of SIGTERM."""
        self._ending.set()

    def renew(self) -> None:
        """Have Envoy use a renewed certificate, without a restart."""
        record = self.door.record()
        if record:
            pems = (Path(record.certificate).read_bytes(), Path(record.key).read_bytes())
            if pems != self._shown and self._shown:
                self.door.show_certificate(Path(record.certificate), Path(record.key))
            self._shown = pems

    def eject(self) -> None:
        """Eject each version that keeps failing and has a fallback: for a while, the fallback gets its requests."""
        traffic = self.door.traffic()
        failing = {
            cluster["name"]
            for cluster in self.door.admin.clusters()
            for host in cluster.get("host_statuses", [])
            if host["health_status"].get("failed_outlier_check")
        }
        ejected = tuple(
            (served.model, served.version)
            for served in traffic.served
            if any(cluster_name(protocol, served) + GUARDED in failing for protocol in PROTOCOLS)
        )
        if ejected != traffic.ejected:
            logger.warning("ejected: %s", ", ".join("/".join(version) for version in ejected) or "none")
            self.door.change(lambda now: replace(now, ejected=ejected))


def _try(step: Callable[[], None]) -> None:
    """Run a step of the keeper. A step that fails is logged, and runs again in the next round."""
    try:
        step()
    except (ServerError, OSError) as error:
        logger.warning("%s", error)
    except Exception:  # one failing step must not end the keeper
        logger.exception("a step of the keeper failed")


def main() -> None:
    root = Path(sys.argv[1])
    log = RotatingFileHandler(State(root).logs / LOG, maxBytes=LOG_BYTES, backupCount=1)
    logging.basicConfig(format="%(asctime)s [%(levelname)s] %(name)s - %(message)s", handlers=[log])
    keeper = Keeper(root)
    signal.signal(signal.SIGTERM, keeper.end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is meant for `up`
    keeper.run()


if __name__ == "__main__":
    main()
