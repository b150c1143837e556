"""The processes that compute a model together, from the worker's side: started, asked, ended."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import tempfile
import time
from dataclasses import asdict
from typing import Any

from torchserve_dag.runtime.compat import link
from torchserve_dag.runtime.compat.process import Process, ProcessError, ProcessTooSlowError
from torchserve_dag.runtime.models.language.ranks.rank import CANCEL, Job, RankSpec

PROGRAM = "torchserve_dag.runtime.models.language.ranks.rank"
_ASK_S = 5.0
"""How long a rank may take to read a request: it waits for one."""


class Ranks:
    """One generation of processes, which all end with this object."""

    def __init__(self, spec: RankSpec, name: str) -> None:
        self._answered: set[int] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._processes: list[Process] = []
        try:
            for rank in range(spec.ranks):
                settings = asdict(spec) | {"rank": rank, "store": f"{self._folder.name}/store"}
                self._processes.append(Process(f"{name} rank {rank}", None, settings, PROGRAM))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        self._folder.cleanup()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def interrupt(self) -> None:
        """From another thread: let whatever waits for the ranks find them ended."""
        for process in self._processes:
            process.interrupt()

    def loaded(self, within_s: float) -> None:
        """Wait until every rank has loaded its part. Raises ProcessError."""
        end = time.monotonic() + within_s
        self._answered.clear()
        while len(self._answered) < len(self._processes):
            self.message(end)

    def ask(self, job: Job) -> None:
        """Begin an answer. Raises ProcessError."""
        self._answered.clear()
        message = json.dumps(asdict(job)).encode()
        for process in self._processes:
            process.send(link.BATCH, message, _ASK_S)

    def cancel(self) -> None:
        """End the answer in progress at its next token. Raises ProcessError."""
        self._processes[0].send(CANCEL, b"", _ASK_S)

    def message(self, end: float, wake: socket.socket | None = None) -> int | str | None:
        """The answer's next token, or its finish reason once all ranks are ready for the next one; None for neither.

        Raises ProcessError, and ProcessTooSlowError at the time `end`.
        """
        left = max(0.0, end - time.monotonic())
        ready = self._ready(left, wake)
        if ready is None:
            raise ProcessTooSlowError("the ranks took too long")
        for rank in ready:
            kind, message = self._processes[rank].receive(_ASK_S, f"rank {rank} sent half a message")
            if kind == link.FAILED:
                raise ProcessError(message.decode("utf-8", "replace"))
            if kind == link.CHUNK:
                return int(message)
            self._answered.add(rank)
            if rank == 0:
                self._reason = message.decode()
            if len(self._answered) == len(self._processes):
                return self._reason
        return None

    def idle(self, wake: socket.socket) -> None:
        """Wait until `wake` is readable. Raises ProcessError if a rank ends."""
        if self._ready(None, wake):
            self.message(time.monotonic() + _ASK_S)

    def _ready(self, within_s: float | None, wake: socket.socket | None) -> list[int] | None:
        """The ranks that have something to say; None where nothing comes in time."""
        sockets: list[Any] = [*self._processes, *([wake] if wake else [])]
        ready = select.select(sockets, [], [], within_s)[0]
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                wake.recv(1 << 12)  # type: ignore[union-attr]
        return [rank for rank, process in enumerate(self._processes) if process in ready] if ready else None
