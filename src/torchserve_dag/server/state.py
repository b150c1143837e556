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
from typing import Any

from torchserve_dag.archives import atomic
from torchserve_dag.runtime.data import plain
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.ports import Addresses

FOLDER = ".torchserve-dag"


@dataclass(frozen=True, slots=True)
class TorchServeProcess:
    """The TorchServe that was started: what a later command needs to find the same process again."""

    pid: int
    """The id of its Java process."""
    addresses: Addresses
    store: str = "model_store"
    """The project's folder of archives; those that are served were copied from there."""


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
        self._server = self.folder / "server.json"

    def prepare(self) -> None:
        """Make the folder, and delete what an earlier server left in it, except its logs."""
        self.make()
        self.logs.mkdir(mode=0o700, exist_ok=True)
        atomic.write_private(self.folder / ".gitignore", "*\n")
        self.clear()
        self.tmp.mkdir(mode=0o700)

    def clear(self) -> None:
        """Delete what a server that has ended left: its record, its keys, its unpacked archives."""
        for path in (self._server, self.key_file):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.tmp, ignore_errors=True)

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

    def record(self) -> TorchServeProcess | None:
        """The server that was started last, whether it still runs or not."""
        try:
            return plain.build(TorchServeProcess, _read(self._server))
        except plain.WrongDataError:  # no record, or the record of another version of this package
            return None

    def save(self, record: TorchServeProcess) -> None:
        _write(self._server, plain.flatten(record))


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
