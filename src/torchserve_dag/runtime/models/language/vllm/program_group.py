"""The program between a worker and a server that it starts: it ends the server, and all that the server started.

Run by its path, with nothing on Python's path: `python -I program_group.py PARENT FOLDER COMMAND…`. It ends when the
worker does, even by SIGKILL, when the command does, and at SIGTERM. A server of several processes leaves some of them
behind when one of them is killed; they are in this program's group, so they are ended with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from typing import NoReturn

PR_SET_PDEATHSIG = 1
GRACE_S = 5.0
"""How long a server may take to end by itself: it removes its shared memory."""


def main() -> None:
    parent, folder, *command = sys.argv[1:]
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the worker
    program = None
    try:
        _end_with_parent(signal.SIGTERM)
        if os.getppid() == int(parent):  # else the worker ended before this program was asked to end with it
            program = subprocess.Popen(command, preexec_fn=_killed_with_parent)  # noqa: PLW1509, S603 (of one thread)
            status = program.wait()
            how = signal.strsignal(-status) if status < 0 else f"status {status}"
            sys.stdout.write(f"it ended ({how})\n")
            sys.stdout.flush()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if program and program.poll() is None:
            program.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(GRACE_S)
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)  # this program too


def _exit(*_: object) -> NoReturn:
    raise SystemExit


def _killed_with_parent() -> None:
    _end_with_parent(signal.SIGKILL)


def _end_with_parent(by: signal.Signals) -> None:
    """Get a signal once the thread that started this process ends, however it ends. Only Linux has it."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)


if __name__ == "__main__":
    main()
