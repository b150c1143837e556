"""Reads documents in a process of their own: a hostile one may take its time or its memory, and nothing else.

The process is spawned, not forked: the store and the models have threads, which a forked process would lack.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from torchserve_dag.retrieval.documents import Document, DocumentError, Kind
from torchserve_dag.retrieval.reading import read
from torchserve_dag.retrieval.sections import Section

LIMIT_S = 60.0
"""For one document."""
LIMIT_BYTES = 2 * 2**30
"""Of the process's memory."""
START_S = 60.0

Task = tuple[Path, str, Kind]


class ReaderProcess:
    """Reads one document after another. Close it, or use it in a `with`."""

    def __init__(self, limit_s: float = LIMIT_S, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit_s, self._limit_bytes = limit_s, limit_bytes
        self._running: tuple[BaseProcess, Connection] | None = None

    def read(self, document: Document) -> list[Section]:
        """Raises DocumentError."""
        _, link = self._running or self._start()
        try:
            link.send((document.path, document.name, document.kind))
            if link.poll(self._limit_s):
                found: list[Section] | str = link.recv()
                if isinstance(found, str):
                    raise DocumentError(found)
                return found
            what = f"takes longer than {self._limit_s:g} s to read"
        except (EOFError, OSError):
            what = f"cannot be read within {self._limit_bytes / 2**30:g} GB of memory"
        self.close()
        raise DocumentError(f"{document.name} {what}: left out.")

    def _start(self) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._limit_bytes), daemon=True)
        process.start()
        theirs.close()
        self._running = process, ours
        if not ours.poll(START_S) or ours.recv() != "ready":
            self.close()
            raise RuntimeError(f"the process that reads documents did not start within {START_S:g} s")
        return process, ours

    def close(self) -> None:
        if self._running:
            process, link = self._running
            link.close()
            process.kill()
            process.join(10)
            self._running = None

    def __enter__(self) -> ReaderProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(link: Connection, limit_bytes: int) -> None:
    """What the process runs, until the link is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the command's, which ends this process
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    link.send("ready")
    with suppress(EOFError, OSError):
        while True:
            path, name, kind = link.recv()
            link.send(_read(path, name, kind))


def _read(path: Path, name: str, kind: Kind) -> list[Section] | str:
    try:
        return read(path, name, kind)
    except DocumentError as error:
        return str(error)
    except (MemoryError, RecursionError) as error:
        return f"{name} cannot be read: {type(error).__name__}."
