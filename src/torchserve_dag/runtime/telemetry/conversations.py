"""The file of requests and their answers that `serve: {keep: …}` asks for; without it nothing of them is kept."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.engine.answered import AnsweredRequest
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.telemetry.plain_request import cut, plain_request, redacted, size_of

logger = logging.getLogger(__name__)

MAX_WAITING = 16 * 2**20
"""How many characters may wait to be written; requests beyond it are not kept."""
LAST_LINES_S = 5.0
"""How long `close` waits until everything is written."""
FOLDER = "LOG_LOCATION"
"""The environment variable with the folder of logs, which both hosts set for their workers."""


@dataclass(slots=True)
class KeptCounts:
    """How many requests were kept, and how many were not, by the reason."""

    kept: int = 0
    busy: int = 0
    """The disk, or `redact`, was too slow."""
    redact: int = 0
    """`redact` raised."""
    unwritable: int = 0
    """The message or the answer is no plain data, or the disk refused the line."""


class NotKeptError(Exception):
    """The name of the exception because of which a request was not kept, without its message."""


def conversations_of(graph: Graph) -> Conversations | None:
    """The file that a served workflow's `serve.keep` names; None if it names none, or no host says where logs are."""
    keep, folder = graph.serve.keep, os.environ.get(FOLDER)
    if keep is None:
        return None
    if folder is None and not Path(keep.file).is_absolute():
        logger.warning("%s: nothing is kept in %s, because no host has set %s", graph.name, keep.file, FOLDER)
        return None
    path = Path(folder or "/") / keep.file
    return Conversations(path, graph.name, graph.version, keep.megabytes * 2**20, graph.redact)


class Conversations:
    """Writes a line for each request of a workflow, in a thread of its own. The threads of several workers and
    workflows may write into one file.
    """

    def __init__(
        self, path: Path, workflow: str, version: str, limit: int, redact: Callable[[str], str] | None = None
    ) -> None:
        """`limit`: how many bytes the file may have, together with its older half."""
        self._path, self._limit, self._redact = path, limit, redact
        self._about = {"workflow": workflow, "version": version}
        self._waiting: deque[tuple[dict[str, Any], int]] = deque()
        self._waiting_size = 0
        self._counts = KeptCounts()
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        """Runs from the first request on."""

    def keep(self, request: AnsweredRequest) -> None:
        """Have a request written. Never raises, and never waits for the disk."""
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        try:
            line = {"time": time, "request_id": request.request_id, **self._about, **plain_request(request)}
            size = size_of(line)
        except Exception as error:  # noqa: BLE001 (a user's message may raise anything)
            self._count("unwritable", error, request.request_id)
            return
        with self._changed:
            if self._closed or self._waiting_size + size > MAX_WAITING:
                self._counts.busy += 1
                return
            self._waiting.append((line, size))
            self._waiting_size += size
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="conversations", daemon=True)
                self._thread.start()

    def counts(self) -> KeptCounts:
        with self._changed:
            return replace(self._counts)

    def close(self) -> None:
        """Write what waits, for a few seconds at most."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread:
            thread.join(LAST_LINES_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                line, size = self._waiting.popleft()
            self._write(line)
            with self._changed:
                self._waiting_size -= size

    def _write(self, line: dict[str, Any]) -> None:
        about = line["request_id"]
        try:
            said = {name: line.pop(name) for name in ("message", "answer", "failure") if name in line}
            line |= cut(redacted(said, self._redact) if self._redact else said)
        except Exception as error:  # noqa: BLE001 (the function is the user's)
            self._count("redact", error, about)
            return
        try:
            self._append(json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n")
        except (OSError, TypeError, ValueError) as error:
            self._count("unwritable", error, about)
        else:
            with self._changed:
                self._counts.kept += 1

    def _append(self, line: bytes) -> None:
        if len(line) > self._limit // 2:
            raise ValueError(f"it has {len(line):,} bytes, and the file may have {self._limit:,}")
        # Opened for each line, which is a single write: any worker may rotate the file.
        with self._opened() as file:
            if os.fstat(file.fileno()).st_size + len(line) <= self._limit // 2:
                file.write(line)
                return
            self._rotate(file.fileno())
        with self._opened() as file:
            file.write(line)

    def _opened(self) -> io.FileIO:
        return io.FileIO(self._path, "a", opener=lambda path, flags: os.open(path, flags, 0o600))

    def _rotate(self, file: int) -> None:
        """The file becomes the older half, unless another worker does so now, or has just done it."""
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), self._path.stat()):
                self._path.replace(self._path.with_suffix(".1.jsonl"))

    def _count(self, reason: str, error: Exception, request_id: str) -> None:
        if not isinstance(error, OSError):  # what it says may have the client's text
            error = NotKeptError(type(error).__name__).with_traceback(error.__traceback__)
        logs.report(logger, error, f"request {request_id}: it is not kept")
        with self._changed:
            setattr(self._counts, reason, getattr(self._counts, reason) + 1)
