"""The gateway's program: `python -m torchserve_dag.gateway PROJECT`."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path

from torchserve_dag.direct import http
from torchserve_dag.front_door.start import raise_open_files
from torchserve_dag.gateway.app import GatewayApp
from torchserve_dag.gateway.process import LOG, Gateway
from torchserve_dag.runtime.logs import Formatter
from torchserve_dag.server.state import State
from torchserve_dag.server.supervised import Supervised

LOG_BYTES = 2 * 2**20


def main(root: Path) -> None:
    state = State(root)
    file = RotatingFileHandler(state.logs / LOG, maxBytes=LOG_BYTES, backupCount=1)
    file.setFormatter(Formatter(logging.Formatter("%(asctime)s [%(levelname)s] %(name)s - %(message)s")))
    logging.basicConfig(handlers=[file], level=logging.INFO)
    logging.raiseExceptions = False
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is meant for `up`
    raise_open_files()
    supervised = Supervised(state)

    def ready(_: Callable[[], None]) -> None:
        record = supervised.record("gateway")
        if record is None or record.pid == os.getpid():
            supervised.started("gateway", os.getpid())

    socket = Gateway(state).socket
    listening = http.listen_at(socket)
    socket.chmod(0o600)
    app = GatewayApp(state).app
    http.run(http.serve(app, listening, ready, drains_on=(), idle_s=http.BEHIND_ENVOY_S))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
