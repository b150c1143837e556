"""The gateway's process: started, found again by its record, ended once Envoy is drained."""

from __future__ import annotations

import signal
import sys
import time

from torchserve_dag.front_door.backend import GATEWAY
from torchserve_dag.server import processes
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State
from torchserve_dag.server.supervised import Supervised

PROGRAM = (sys.executable, "-m", "torchserve_dag.gateway")
START_S = 60.0
END_S = 5.0
LOG = "gateway.log"


class Gateway:
    """The gateway of a project. It outlives the process that started it."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.socket = state.front_door / GATEWAY
        self._supervised = Supervised(state)

    def start(self) -> None:
        folder = self.socket.parent.resolve()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Who sends SIGTERM to every process at once, as systemd may, must not end it before Envoy is drained.
        pid = processes.spawn([*PROGRAM, str(self.state.root.resolve())], self.state, blocked=[signal.SIGTERM])
        self._supervised.started("gateway", pid, "is starting")

    def wait(self) -> None:
        """Wait until it answers. Raises ServerError."""
        deadline = time.monotonic() + START_S
        while (record := self._supervised.record("gateway")) is None or record.problem:
            if self._supervised.process("gateway") is None or time.monotonic() > deadline:
                raise ServerError(f"The gateway did not start: see {LOG} in {self.state.logs}.")
            time.sleep(0.05)

    def end(self) -> None:
        """End it: Envoy is drained, so no request is inside."""
        process = self._supervised.process("gateway")
        processes.kill([process] if process else [])
        processes.wait([process] if process else [], END_S)
