"""A project's state folder: the running server, its keys, its logs, its copies of the archives.

Only its owner may enter it: another user could read the logs, or hold a lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchserve_dag.archives import atomic
from torchserve_dag.runtime.data import plain
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.ports import Addresses

FOLDER = ".torchserve-dag"


Host = Literal["torchserve", "direct"]
"""What the models' workers belong to: TorchServe, or the keeper itself, with no server between them and Envoy."""


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """The server that was started: what a later command needs to find it again."""

    pid: int
    """The id of TorchServe's Java process; 0 for the direct host, which has no process of its own."""
    addresses: Addresses
    store: str = "model_store"
    """The project's folder of archives; those that are served were copied from there."""
    host: Host = "torchserve"


@dataclass(frozen=True, slots=True)
class Serving:
    """What `up` has started, and what is kept running until `down`."""

    front_door: bool = True
    access_log: bool = False
    timeout_s: float = 600.0
    """How long the models may take to load."""
    host: Host = "torchserve"
    opened: bool = True
    """Whether `up` has ended, which opens the door: the direct host's keeper runs before."""
    vllm_metrics: bool = False

    @property
    def envoy(self) -> bool:
        """Whether Envoy runs: it is the direct host's network side, too."""
        return self.front_door or self.host == "direct"


class State:
    """The state folder of the project at `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root.resolve() / FOLDER
        self.config = self.folder / "config.properties"
        self.logs = self.folder / "logs"
        self.tmp = self.folder / "tmp"
        self.key_file = self.folder / "key_file.json"
        """TorchServe writes its key file into its working directory, which is this folder."""
        self.archives = self.folder / "archives"
        """The server's own copies of the archives that it serves."""
        self.front_door = self.folder / "front_door"
        self.processes = self.folder / "processes"
        self.direct = self.folder / "direct"
        """The direct host's: what it serves, its workers' records and sockets, its unpacked archives."""
        self._server = self.folder / "server.json"
        self._serving = self.folder / "serving.json"

    def prepare(self) -> None:
        """Make the folder, and delete what an earlier server left in it, except its logs."""
        self.make()
        self.logs.mkdir(mode=0o700, exist_ok=True)
        atomic.write_private(self.folder / ".gitignore", "*\n")
        self.clear()
        self.tmp.mkdir(mode=0o700)

    def clear(self) -> None:
        """Delete what a server that has ended left: its records, its keys, its unpacked archives."""
        for path in (self._server, self._serving, self.key_file):
            path.unlink(missing_ok=True)
        for folder in (self.processes, self.tmp, self.direct):
            shutil.rmtree(folder, ignore_errors=True)

    def clear_torchserve(self) -> None:
        """Delete what a TorchServe that has ended left for the next: its keys, its unpacked archives, its sockets."""
        self.key_file.unlink(missing_ok=True)
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.tmp.mkdir(mode=0o700)

    def make(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)  # an earlier version of this package made it readable for all

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Raises ServerError while another `up` or `down` of this project runs."""
        self.make()
        busy = "Another torchserve-dag up or down of this project is running: wait until it ends."
        with locked(self.folder / "lock", 0.0, busy):
            yield

    def record(self) -> ServerRecord | None:
        """The server that was started last, whether it still runs or not."""
        try:
            return plain.build(ServerRecord, _read(self._server))
        except plain.WrongDataError:  # no record, or the record of another version of this package
            return None

    def save(self, record: ServerRecord) -> None:
        _write(self._server, plain.flatten(record))

    def serving(self) -> Serving | None:
        """What is to be kept running; None before `up` starts a keeper, and after `down` has begun."""
        try:
            return plain.build(Serving, _read(self._serving))
        except plain.WrongDataError:
            return None

    def save_serving(self, serving: Serving) -> None:
        _write(self._serving, plain.flatten(serving))

    def forget_serving(self) -> None:
        """Nothing is started again from now on, and the keeper ends all."""
        self._serving.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait_s: float, busy: str) -> Iterator[None]:
    """Hold a lock between threads and processes. Raises ServerError with `busy` if it is not free in time."""
    deadline = time.monotonic() + wait_s
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= deadline:
                    raise ServerError(busy) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(file)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ServerError(f"{path} cannot be read ({error}): delete it.") from None
    return data if isinstance(data, dict) else None


def _write(path: Path, data: dict[str, Any]) -> None:
    atomic.write_private(path, json.dumps(data, indent=2) + "\n")
