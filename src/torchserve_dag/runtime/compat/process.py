"""A process of a worker's, from the worker's side: started, loaded, asked, ended. An unedited handler has one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torchserve_dag.runtime.compat import link
from torchserve_dag.runtime.compat.wire import (
    NotAllThereError,
    ProtocolError,
    WireRequest,
    WireResponse,
    read_responses,
    write_requests,
)

PROGRAM = "torchserve_dag.runtime.compat.child"
_ROOT = Path(__file__).absolute().parents[3]
"""The folder of this package: an archive's, or where the package is installed."""

_END_S = 2.0
"""How long a process may take to end by itself once its socket is closed."""
_LONGEST_LINE = 1 << 13
_FOR_TORCHSERVE = ("[METRICS]", "[PID]")
"""What begins a line that TorchServe obeys."""


class ProcessError(Exception):
    """The process cannot be used any more; the text is a clause that says why."""


class ProcessTooSlowError(ProcessError):
    """It did not do something in time."""


@dataclass(frozen=True, slots=True)
class Messages:
    """One message of responses."""

    kind: bytes
    """link.CHUNK or link.ANSWER."""
    code: int
    """Over 399 where the whole batch failed."""
    text: str
    responses: Sequence[WireResponse]


class Process:
    """A process of a program of this package. It ends with the thread that makes this object."""

    def __init__(self, name: str, folder: Path | None, settings: Mapping[str, Any], program: str = PROGRAM) -> None:
        """`settings` are what the program reads first; child.py lives in `folder` as a TorchServe worker does.

        Raises OSError where no process can be started.
        """
        self.name = name
        self._link, theirs = socket.socketpair()
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        own = [str(folder)] if folder else []
        path = [str(_ROOT), *own, *(one for one in inherited if one and Path(one).absolute() != _ROOT)]
        with theirs:
            self._program = subprocess.Popen(  # noqa: S603 (this program)
                [sys.executable, "-m", program, str(theirs.fileno())],
                cwd=_ROOT,  # not yet `folder`: its files must not be found before this program's
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is for the worker, and `end` reaches its children too
            )
        threading.Thread(target=_copy_lines, args=(name, self._program.stdout), name=f"{name} log", daemon=True).start()
        with contextlib.suppress(OSError):  # it has ended: `loaded` says so
            link.send(self._link, link.SETTINGS, json.dumps({**settings, "name": name, "folder": str(folder)}).encode())

    @property
    def pid(self) -> int:
        return self._program.pid

    @property
    def link(self) -> socket.socket:
        """This end of the socket, for a program whose messages are not those of link.py."""
        return self._link

    def fileno(self) -> int:
        """The descriptor that is readable once the process has ended, between two batches."""
        return self._link.fileno()

    def loaded(self, within_s: float) -> bytes:
        """Wait until its handler is loaded. Raises ProcessError."""
        kind, message = self.receive(within_s, f"it was not loaded within {within_s:g} s")
        if kind == link.LOADED:
            return bytes(message)
        raise ProcessError(message.decode("utf-8", "replace"))

    def ask(self, requests: Sequence[WireRequest], within_s: float) -> None:
        """Send a batch. Raises ProcessError."""
        self.send(link.BATCH, write_requests(requests), within_s)

    def send(self, kind: bytes, message: bytes, within_s: float) -> None:
        """Send a message. Raises ProcessError."""
        try:
            link.send(self._link, kind, message, within_s)
        except TimeoutError:
            raise self._too_slow(f"it did not read its batch within {within_s:g} s") from None
        except OSError:
            raise self.ended() from None

    def answer(self, within_s: float, limit_s: float) -> Messages:
        """The next message about the batch, within what is left of its limit. Raises ProcessError."""
        kind, message = self.receive(within_s, f"it took longer than {limit_s:g} s")
        try:
            return Messages(kind, *read_responses(message))
        except (NotAllThereError, ProtocolError):
            self.kill()
            raise ProcessError("it sent what cannot be read, so its process was ended") from None

    def idle(self) -> None:
        """Read what the process sends while it has no batch: nothing that anybody waits for. Raises ProcessError."""
        self.receive(_END_S, "it sent half a message")

    def end(self) -> None:
        """End the process, and those that it started; let it end by itself first."""
        self._link.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._program.wait(_END_S)
        self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._program.wait()
        self._link.close()

    def interrupt(self) -> None:
        """From another thread: let whatever waits for the process find it ended."""
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)

    def receive(self, within_s: float, too_slow: str) -> tuple[bytes, bytearray]:
        """The next message and its kind; `too_slow` says what did not come in time. Raises ProcessError."""
        try:
            received = link.receive(self._link, within_s)
        except TimeoutError:
            raise self._too_slow(too_slow) from None
        except OSError:
            received = None
        if received is None:
            raise self.ended()
        return received

    def _too_slow(self, what: str) -> ProcessError:
        self.kill()
        return ProcessTooSlowError(f"{what}, so its process was ended")

    def ended(self) -> ProcessError:
        """Why its socket is closed; from now on, the process has ended."""
        try:
            status = self._program.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return ProcessError("it closed its socket, so its process was ended")
        self.kill()  # what it started may live on
        how = signal.strsignal(-status) if status < 0 else f"status {status}"
        return ProcessError(f"its process ended ({how})")


def _copy_lines(name: str, output: IO[bytes]) -> None:
    """Write a process's output to this one's log, each line behind the node's name: TorchServe must not obey it.

    To the standard error, for the standard output is a program's own.
    """
    with output, contextlib.suppress(ValueError):  # this process's own output is closed
        while line := output.readline(_LONGEST_LINE):
            for part in line.decode("utf-8", "replace").splitlines():  # Java knows as many ends of a line as Python
                if not part.startswith(_FOR_TORCHSERVE):
                    sys.stderr.write(f"{name}: {part}\n")
            sys.stderr.flush()
