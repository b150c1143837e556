"""vLLM's process, from the worker's side: started, watched, started again when it ends, and ended with the worker."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

from torchserve_dag.runtime.models.handler_process import PAUSES_S
from torchserve_dag.runtime.models.language.vllm import program_group
from torchserve_dag.runtime.models.language.vllm.arguments import Command
from torchserve_dag.runtime.models.language.vllm.unix_http import ask, is_ready

logger = logging.getLogger(__name__)

STARTUP_S = 1800.0
"""How long loading a model may take."""
LOOK_S, WATCH_S = 0.2, 1.0
"""Between two looks whether it is loaded, and whether it still runs; the end of its log is seen at once."""
WARM_UP_S = 300.0
"""vLLM compiles where a request first asks for log-probabilities: for up to a minute, in which nobody is served."""
LONGEST_LINE = 1 << 13
LONGEST_FOLDER = 60
"""The path of a Unix socket has at most 107 bytes, of which vLLM's own names have some 40."""
_ERROR = re.compile(r"\b(?:\w*(?:Error|Exception)|error): .+")
_CALM = re.compile(r" (?:INFO|WARNING) ")
_REFERS = re.compile(r"(?i)root cause")


class VllmServer:
    """vLLM's server on a private socket, kept alive until `close`. It ends with this process, however that ends."""

    def __init__(self, name: str, command: Command) -> None:
        """Start it, and return at once: `wait` waits until it is loaded."""
        self._name, self._command = name, command
        self._changed = threading.Condition()
        self._socket: Path | None = None
        self._program: subprocess.Popen[bytes] | None = None
        self._why = ""
        """Why it is not loaded: the last exception in its log."""
        self._closed = self._over = False
        # program_group.py ends with the thread that starts it, so this thread lives as long as the server.
        self._thread = threading.Thread(target=self._keep, name=f"{name} vllm", daemon=True)
        self._thread.start()

    @property
    def socket(self) -> Path | None:
        """Where it listens; None while it is being started."""
        return self._socket

    @property
    def pid(self) -> int | None:
        """The group of its processes."""
        return self._program.pid if self._program else None

    def wait(self) -> Path:
        """Wait until it is loaded, and return its socket. Raises ValueError if it cannot be."""
        with self._changed:
            self._changed.wait_for(lambda: self._socket or self._over, STARTUP_S)
            if self._socket:
                return self._socket
        self.close()
        raise ValueError(f"vllm does not serve {self._name}: {self._why or 'it ended while it was loading'}")

    def close(self) -> None:
        """End it, and wait for its end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(2 * program_group.GRACE_S)

    # The thread that keeps it alive.

    def _keep(self) -> None:
        failed = 0
        try:
            while not self._closed:
                served = self._run()
                if self._closed or not (served or failed):
                    return  # it has never been loaded
                failed = 1 if served else failed + 1
                pause_s = PAUSES_S[min(failed, len(PAUSES_S)) - 1]
                logger.error("%s: vllm ended; it is started again in %d s", self._name, pause_s)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, pause_s)
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _run(self) -> bool:
        """Run it once, until it ends or is closed; whether it was loaded."""
        short = len(tempfile.gettempdir()) <= LONGEST_FOLDER
        folder = Path(tempfile.mkdtemp(prefix="vllm-", dir=None if short else "/tmp"))  # noqa: S108 (0700, a new name)
        try:
            self._program = program = self._start(folder)
            threading.Thread(
                target=self._copy_lines, args=(program.stdout,), name=f"{self._name} vllm log", daemon=True
            ).start()
            try:
                return self._serve(program, folder / "socket")
            finally:
                self._end(program)
        except OSError as error:
            self._why = f"{error.filename or 'it'}: {error.strerror or error}"
            return False
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self, folder: Path) -> subprocess.Popen[bytes]:
        group = [sys.executable, "-I", "-S", program_group.__file__, str(os.getpid()), str(folder)]
        return subprocess.Popen(  # noqa: S603 (this package's, with vLLM)
            [*group, *self._command.words, "--uds", str(folder / "socket")],
            cwd=folder,
            env={**self._command.environment, "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _serve(self, program: subprocess.Popen[bytes], socket: Path) -> bool:
        limit = time.monotonic() + STARTUP_S
        while not self._closed and program.poll() is None:
            if self._socket is None and is_ready(socket):
                _warm_up(socket, self._name)
                with self._changed:
                    self._socket = socket
                    self._changed.notify_all()
            if self._socket is None and time.monotonic() > limit:
                self._why = f"it was not loaded within {STARTUP_S:g} s"
                return False
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or program.poll() is not None, LOOK_S if self._socket is None else WATCH_S
                )
        return self._socket is not None

    def _end(self, program: subprocess.Popen[bytes]) -> None:
        with self._changed:
            self._socket = None
        program.terminate()  # program_group ends the others
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(program_group.GRACE_S + 1)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(program.pid, signal.SIGKILL)  # it may have been killed itself
        program.wait()

    def _copy_lines(self, output: IO[bytes]) -> None:
        """Write its output to this process's log, each line behind the model's name."""
        with output, contextlib.suppress(ValueError):  # this process's own output is closed
            while line := output.readline(LONGEST_LINE):
                for part in line.decode("utf-8", "replace").splitlines():
                    if self._socket is None:
                        self._why = reason(part, self._why)
                    sys.stderr.write(f"{self._name} vllm: {part}\n")
                sys.stderr.flush()
        with self._changed:
            self._changed.notify_all()


def _warm_up(socket: Path, name: str) -> None:
    with contextlib.suppress(OSError):
        ask(socket, "/v1/completions", {"model": name, "prompt": "a", "max_tokens": 1, "logprobs": 1}, WARM_UP_S)


def reason(line: str, before: str) -> str:
    """Why it is not loaded, after one more line of its log: the last exception, but for those that refer to another."""
    found = _ERROR.search(line)
    if found is None or _CALM.search(line) or (before and _REFERS.search(line)):
        return before
    return found[0][:500]
