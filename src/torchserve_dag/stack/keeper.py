"""The keeper: it starts Envoy, the gateway, TorchServe and its own watcher again if they end, ejects versions that keep
failing for a while, and runs rollouts without a terminal. Of the direct host it has the workers and the management API.

None of these processes is its own: another keeper finds them by their records. On SIGTERM, or when nothing is to be
served any more (`down`), it drains the front door, and then ends Envoy and TorchServe: no accepted request is lost.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import psutil

from torchserve_dag.clients import ServingError
from torchserve_dag.front_door.door import Door
from torchserve_dag.front_door.envoy import Envoy
from torchserve_dag.front_door.envoy_config import GUARDED, PROTOCOLS, cluster_name
from torchserve_dag.gateway.process import Gateway
from torchserve_dag.releases.rollout import Rollouts
from torchserve_dag.server import processes
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.logs import Logs
from torchserve_dag.server.state import Serving, State
from torchserve_dag.server.supervised import Supervised
from torchserve_dag.stack import start, supervise
from torchserve_dag.stack.attempt import attempt
from torchserve_dag.stack.heal import Healer
from torchserve_dag.stack.management import Management
from torchserve_dag.stack.metrics_page import MetricsPage
from torchserve_dag.stack.watch import Watch
from torchserve_dag.stack.worker_process import rotate_logs
from torchserve_dag.stack.workers import Workers

logger = logging.getLogger(__name__)

EVERY = 5
"""In so many rounds one looks at what is not a process: certificate, ejections, rollouts, logs."""
LOG = "keeper.log"
JOIN_S = 90.0
"""How long a start of TorchServe may take to be given up."""


class _EndingError(Exception):
    """The keeper ends while it starts TorchServe."""


class Keeper:
    """The keeper of one project."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = State(root)
        self.supervised = Supervised(self.state)
        self.door = Door(self.state)
        self.envoy = Envoy(self.state)
        self.rollouts = Rollouts(root)
        self._ending = threading.Event()
        self._shown: tuple[bytes, bytes] | None = None
        self._logs = Logs(self.state.logs)
        self._starting: threading.Thread | None = None
        self._failure = ""
        self._healer = Healer(self.state)
        self._watches = {
            "watcher": Watch(self.supervised, "watcher", lambda: supervise.start_watcher(self.state)),
            "Envoy": Watch(self.supervised, "Envoy", self.envoy.start),
            "gateway": Watch(self.supervised, "gateway", Gateway(self.state).start),
            "TorchServe": Watch(self.supervised, "TorchServe", self._start_torchserve, self._why_torchserve_ended),
        }

    def run(self) -> None:
        """Run until `end` is called or nothing is to be served any more."""
        serving = self.state.serving()
        if serving:
            self._adopt()
            direct = self._begin_direct(serving) if serving.host == "direct" else None
            for turn in itertools.count():
                if self._ending.wait(supervise.POLL_S) or self.state.serving() is None:
                    break
                if direct:
                    attempt(direct.look)
                attempt(partial(self._round, turn, serving))
        self._end_all()

    def end(self, _signal: int, _frame: FrameType | None) -> None:
        """The handler of SIGTERM."""
        self._ending.set()

    def _adopt(self) -> None:
        # A keeper that was killed while a version loaded may have left its workers stopped (releases/load_throttle.py).
        for process in processes.family(self.state):
            with suppress(psutil.Error):
                process.resume()
        self.rollouts.roll_back_running()
        # Or it was killed while it started TorchServe, and nobody would open the door: then that is begun anew.
        record, java = self.supervised.record("TorchServe"), self.supervised.process("TorchServe")
        if record and record.problem and java:
            processes.kill([java])

    def _begin_direct(self, serving: Serving) -> Workers:
        """Serve the management API, whose calls change which workers there are to be."""
        workers = Workers(self.state)
        attempt(workers.look)  # they load while this process imports the rest
        from torchserve_dag.stack import management_app  # noqa: PLC0415 (half of all that the keeper imports)

        page = MetricsPage(self.door, workers, vllm_names_of_all=serving.vllm_metrics)
        management_app.serve(self.state, Management(self.state, workers), page.text)
        return workers

    def _round(self, turn: int, serving: Serving) -> None:
        attempt(self._watches["watcher"].look)
        if serving.envoy:
            attempt(self._watches["Envoy"].look)
            attempt(self._watches["gateway"].look)
        if serving.host == "torchserve" and (self._starting is None or not self._starting.is_alive()):
            attempt(self._watches["TorchServe"].look)
        if not serving.envoy or not self.envoy.running() or not self.envoy.listens() or turn % EVERY:
            return
        for step in (self.envoy.rotate_logs, partial(rotate_logs, self.state), self.renew):
            attempt(step)
        if not self.door.traffic().closed:
            if serving.host == "torchserve":
                attempt(self._healer.look)
            for step in (self.eject, self.rollouts.start_requested):
                attempt(step)

    def _start_torchserve(self) -> None:
        """Begin to start TorchServe. Meanwhile the keeper watches the other processes."""
        self._starting = threading.Thread(target=self._restart_torchserve, name="TorchServe", daemon=True)
        self._starting.start()

    def _restart_torchserve(self) -> None:
        self._failure = ""
        try:
            start.restart_torchserve(self.state, self._go_on)
            logger.info("TorchServe serves again")
        except _EndingError:
            return
        except (ServerError, ServingError, OSError) as error:
            self._failure = str(error).rstrip(".")
        except Exception as error:  # the thread's end must have a reason
            logger.exception("TorchServe cannot be started")
            self._failure = f"{type(error).__name__}: {error}"

    def _go_on(self, *_: object) -> None:
        if self._ending.is_set() or self.state.serving() is None:
            raise _EndingError

    def _why_torchserve_ended(self) -> str:
        return self._failure or self._logs.server_failure() or ""

    def _end_all(self) -> None:
        self.state.forget_serving()
        if self._starting:
            self._starting.join(JOIN_S)
        self.rollouts.store.forget_running()
        watcher = self.supervised.process("watcher")
        start.end(self.state, {os.getpid(), *([watcher.pid] if watcher else [])})

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
            if (hosts := cluster.get("host_statuses"))
            and all(host["health_status"].get("failed_outlier_check") for host in hosts)
        }
        ejected = tuple(
            (served.model, served.version)
            for served in traffic.served
            if any(cluster_name(protocol, served) + GUARDED in failing for protocol in PROTOCOLS)
        )
        if ejected != traffic.ejected:
            logger.warning("ejected: %s", ", ".join("/".join(version) for version in ejected) or "none")
            self.door.change(lambda now: replace(now, ejected=ejected))


def main(root: Path) -> None:
    supervise.log_to(State(root), LOG)
    keeper = Keeper(root)
    signal.signal(signal.SIGTERM, keeper.end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is meant for `up`
    try:
        with supervise.alone(keeper.state, "keeper"):
            keeper.run()
    except ServerError as error:
        sys.exit(str(error))
