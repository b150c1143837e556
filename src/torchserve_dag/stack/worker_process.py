"""One worker of the direct host: its process, its record, and what it says when it is asked."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from torchserve_dag import direct
from torchserve_dag.archives import atomic
from torchserve_dag.archives.archive import ModelVersion
from torchserve_dag.runtime.data import plain
from torchserve_dag.server import processes
from torchserve_dag.server.hosted import HostedVersion
from torchserve_dag.server.sockets import SocketConnection
from torchserve_dag.server.state import State

PROGRAM = Path(direct.__path__[0]) / "worker.py"
LOG_BYTES = 50 * 2**20
ASK_S = 1.0
"""How long a worker may take to say how it is: it computes nothing for that."""


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A worker that was started."""

    id: str
    model: str
    version: str
    archive: str
    pid: int
    ticks: int
    """See ProcessRecord."""
    since: float
    """When it was started, in seconds since 1970."""
    timeout_s: int = 120
    """The longest that a request may take."""
    gpu: int | None = None
    replaced: bool = False
    """Whether it is to leave as soon as another worker is ready in its place."""
    leaving: bool = False
    """Whether it gets no more requests, and ends once those inside are answered."""

    @property
    def key(self) -> ModelVersion:
        return self.model, self.version


class WorkerProcess:
    """A worker that was started by this keeper or an earlier one."""

    def __init__(self, state: State, record: WorkerRecord) -> None:
        self._state, self.record = state, record
        self.ready = False
        self.ready_since = time.monotonic()
        self.why = ""
        """Why it is killed."""
        self.misses = 0
        """How often in a row it has not answered."""

    @classmethod
    def start(cls, state: State, id_: str, one: HostedVersion, gpu: int | None, max_body: int) -> WorkerProcess:
        """Start a worker. Raises OSError."""
        folder = workers_folder(state)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in folder.glob(f"{id_}.*"):
            path.unlink()
        unpacked = state.direct / "models" / Path(one.archive).stem
        # The socket's path is relative to the working directory: a socket's path may have about a hundred characters.
        command = [sys.executable, str(PROGRAM), str(state.archives / one.archive), str(unpacked), f"{id_}.sock"]
        command += ["--max-body", str(max_body)]
        for name, number in (("--gpu", gpu), ("--most", one.most)):
            command += [name, str(number)] if number is not None else []
        state.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(log_of(state, one.key), "ab", opener=atomic.private) as log:
            pid = processes.spawn(
                command,
                state,
                cwd=folder,
                stdout=log.fileno(),
                blocked=[signal.SIGTERM],
                # What TorchServe sets: scores are written there, and its handlers' settings have these names.
                environment={
                    "LOG_LOCATION": str(state.logs),
                    "TS_DECODE_INPUT_REQUEST": "true" if one.decodes else "false",
                    "TS_DEFAULT_RESPONSE_TIMEOUT": str(one.timeout_s),
                    "TS_JOB_QUEUE_SIZE": str(one.queue),
                },
            )
        record = WorkerRecord(
            id_, one.model, one.version, one.archive, pid, processes.ticks(pid), time.time(), one.timeout_s, gpu
        )
        worker = cls(state, record)
        try:
            worker.save(record)
        except BaseException:  # nobody would find it
            worker.kill()
            raise
        return worker

    @classmethod
    def all(cls, state: State) -> list[WorkerProcess]:
        """Every worker that has a record, whether it runs or not."""
        found = []
        for path in sorted(workers_folder(state).glob("*.json")):
            with suppress(OSError, ValueError, plain.WrongDataError):
                found.append(cls(state, plain.build(WorkerRecord, json.loads(path.read_text("utf-8")))))
        return found

    @classmethod
    def end_unknown(cls, state: State) -> None:
        """Kill workers without a record: the keeper that started them was killed before it wrote it."""
        known = {worker.record.pid for worker in cls.all(state)}
        for process in processes.family(state, known):
            with suppress(psutil.Error):
                if str(PROGRAM) in process.cmdline():
                    process.kill()

    def save(self, record: WorkerRecord) -> None:
        self.record = record
        atomic.write_private(self._path("json"), json.dumps(plain.flatten(record)))

    def forget(self) -> None:
        """Delete what a worker that has ended left."""
        for ending in ("json", "sock", "failed"):
            self._path(ending).unlink(missing_ok=True)

    def runs(self) -> bool:
        return processes.still_runs(self.record.pid, self.record.ticks)

    def loads(self) -> bool:
        """Whether it has no socket yet."""
        return not self._path("sock").exists()

    def failure(self) -> str:
        """Why it ended, as it said itself; empty where it said nothing."""
        try:
            return self._path("failed").read_text("utf-8").strip()
        except OSError:
            return ""

    def ask(self, what: str) -> Any:
        """What a worker says of itself (`state` or `metrics`); None if it does not answer, as while it loads."""
        connection = SocketConnection(self._path("sock"), ASK_S)
        try:
            connection.request("GET", f"/worker/{what}")
            answer = connection.getresponse()
            return json.loads(answer.read()) if answer.status == http.HTTPStatus.OK else None
        except (OSError, ValueError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def yield_to_others(self, *, yields: bool) -> None:
        """Let other processes go first where cores are short, as long as it loads, or compete with them again.

        A worker has a session of its own, and so its own share of the cores, whose weight its user may lower and raise
        again; that of a process only root could raise. Nothing happens where the kernel has no such groups.
        """
        with suppress(OSError):
            Path(f"/proc/{self.record.pid}/autogroup").write_text("19" if yields else "0")

    def end(self) -> None:
        """Have it answer what is inside, and end."""
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    @property
    def socket(self) -> str:
        """Its socket, relative to Envoy's folder."""
        return f"../direct/workers/{self.record.id}.sock"

    def memory_mb(self) -> float:
        process = self._process()
        try:
            return process.memory_info().rss / 2**20 if process else 0.0
        except psutil.Error:
            return 0.0

    def _process(self) -> psutil.Process | None:
        try:
            return psutil.Process(self.record.pid) if self.runs() else None
        except psutil.Error:
            return None

    def _signal(self, one: signal.Signals) -> None:
        process = self._process()
        if process:
            with suppress(psutil.Error):
                process.send_signal(one)

    def _path(self, ending: str) -> Path:
        return workers_folder(self._state) / f"{self.record.id}.{ending}"


def workers_folder(state: State) -> Path:
    return state.direct / "workers"


def log_of(state: State, key: ModelVersion) -> Path:
    """The file with all that the workers of a version write."""
    return state.logs / f"worker@{key[0]}@{key[1]}.log"


def rotate_logs(state: State) -> None:
    """Move what a full log of workers has to another file, and empty it: workers hold it open, and append to it."""
    for path in state.logs.glob("worker@*.log"):
        if path.stat().st_size > LOG_BYTES:
            shutil.copyfile(path, path.with_name(f"{path.name}.1"))
            os.truncate(path, 0)
