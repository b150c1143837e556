"""A worker's standard output and error, which a server reads line by line, and some of whose lines it obeys.

TorchServe (0.12.0) takes a line `[METRICS]…` for a metric, and `[PID]…` for the worker's pid, on both streams. Whatever
writes there may hold a client's text: a handler's `print`, an exception's message, a library in C, a child process. So
the descriptors 1 and 2 become pipes to a small process of the worker's (`relay.py`), which takes commands from a third
pipe only. It is a process, because a thread of this one would lose the last words of a crash.
"""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import sys
import threading
from contextlib import suppress

from torchserve_dag.runtime.logs import Formatter
from torchserve_dag.runtime.worker import relay

LAST_WORDS_S = 5.0
"""How long a process that ends waits for its relay. A child process may hold the pipes for longer."""

_taken: WorkerOutput | None = None


def take_over() -> None:
    """From now on only `command` writes lines that the server obeys, and a record of a log begins only one line."""
    global _taken  # noqa: PLW0603 (a process has one output)
    if not _taken:
        _taken = WorkerOutput()
        atexit.register(hand_back)


def hand_back() -> None:
    """Before this process ends: TorchServe itself reads what it says from now on, and nothing of a client's is in it.

    TorchServe ends a worker whose model cannot be loaded within milliseconds, and reads no more: a relay that has just
    been started would lose the reason.
    """
    global _taken
    if _taken:
        ending, _taken = _taken, None  # a command that comes later must not start a relay, or write to a closed pipe
        ending.end()


def command(lines: str) -> None:
    """Write lines that the server obeys."""
    if _taken:
        _taken.command(lines)
    else:
        sys.stdout.write(lines)
        sys.stdout.flush()


class WorkerOutput:
    """The output of this process, and its relay."""

    def __init__(self) -> None:
        self._real = [os.dup(descriptor) for descriptor in (1, 2)]
        # This process keeps the ends to read from, too: should the relay end, nothing is lost until it runs again.
        (commands, self._commands), (output, into_output), (errors, into_errors) = (os.pipe() for _ in range(3))
        self._sources = (commands, output, errors)
        self._starting = threading.Lock()
        self._start()
        sys.stdout.flush()
        sys.stderr.flush()
        for pipe, descriptor in ((into_output, 1), (into_errors, 2)):
            os.dup2(pipe, descriptor)
            os.close(pipe)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(Formatter(handler.formatter))

    def end(self) -> None:
        """Wait until the relay has written everything, and write to the server itself from now on."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        for real, descriptor in zip(self._real, (1, 2), strict=True):
            os.dup2(real, descriptor)
        os.close(self._commands)
        with suppress(subprocess.TimeoutExpired):
            self._relay.wait(LAST_WORDS_S)

    def command(self, lines: str) -> None:
        """Write to the relay. A worker does so once a second, and starts its relay again if it has ended."""
        with self._starting:
            if self._relay.poll() is not None:
                self._start()
        relay.write(self._commands, lines.encode())

    def _start(self) -> None:
        self._relay = subprocess.Popen(  # noqa: S603 (our own arguments)
            [sys.executable, "-I", "-S", str(relay.__file__), *map(str, self._sources)],
            stdin=subprocess.DEVNULL,
            stdout=self._real[0],
            stderr=self._real[1],
            pass_fds=self._sources,
        )
