"""What every system does: start a server on a free port, say where it answers, and end with all its children."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import works

START_S = 300.0
"""The longest that a server may take until it answers."""
END_S = 15.0
"""The longest that it may take to end by itself."""
_SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of Linux's prctl: a descendant whose parent has ended becomes a child of this process."""

Command = list[str | Path]


@dataclass(frozen=True, slots=True)
class Served:
    """Where a system answers; what `main` prints as JSON."""

    rest: str
    headers: dict[str, str] = field(default_factory=dict)
    grpc: dict[str, str] | None = None
    metrics: str | None = None
    answer_ends: bool = False
    """Whether the answer is only the end of the body that comes, behind what the protocol puts before it."""


def main(serve: Callable[[Path, int], None], path: str, *, metrics: str | None = None, **more: Any) -> None:
    """A system whose server is a Python program: `serve(workflow, port)`, which does not return.

    This process is the parent; the server runs in a child, the same program with `--port`. It answers at `path`,
    and has its numbers at the path `metrics`; `more` is what else `Served` may say.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    workflow = options.workflow.resolve()
    if options.port:
        sys.argv = sys.argv[:1]  # some frameworks read it as their own
        serve(workflow, options.port)
        return
    with alone() as folder:
        port = free_ports(1)[0]
        child = start([sys.executable, Path(sys.argv[0]).resolve(), workflow, "--port", str(port)], folder)
        here = f"http://127.0.0.1:{port}"
        announce(Served(here + path, metrics=metrics and here + metrics, **more), workflow, child)


@contextlib.contextmanager
def alone() -> Iterator[Path]:
    """A folder for whatever a server writes. At the end, or at SIGTERM, it goes, with every process started inside."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="system-", ignore_cleanup_errors=True) as folder:
        try:
            yield Path(folder)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _end_all()


def start(command: Command, folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a server in `folder`; what it prints goes to stderr."""
    here = str(Path(__file__).parent)
    return subprocess.Popen(  # noqa: S603 (our own arguments)
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": here, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        start_new_session=True,  # a Ctrl-C in this terminal is not meant for it
    )


def announce(served: Served, workflow: Path, child: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until the server answers, print where, and stay until SIGTERM, or until `child` ends by itself."""
    _wait_until_it_answers(served, workflow, child)
    sys.stdout.write(json.dumps({key: value for key, value in asdict(served).items() if value}) + "\n")
    sys.stdout.flush()
    while child is None or child.poll() is None:
        time.sleep(0.5)
    raise SystemExit(f"the server ended by itself with {child.returncode}")


def free_ports(count: int) -> list[int]:
    """Ports that nobody has, no two the same."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _wait_until_it_answers(served: Served, workflow: Path, child: subprocess.Popen[bytes] | None) -> None:
    body = works.work(workflow).example
    deadline = time.monotonic() + START_S
    with ThreadPoolExecutor(8) as threads:  # all of its workers are to be there, not only the first
        while not (_answers(served, body) and all(threads.map(lambda _: _answers(served, body), range(32)))):
            if child is not None and child.poll() is not None:
                raise SystemExit(f"the server did not start: it ended with {child.returncode}")
            if time.monotonic() > deadline:
                raise SystemExit(f"the server did not answer within {START_S:g} s")
            time.sleep(0.1)


def _answers(served: Served, body: bytes) -> bool:
    headers = {"Content-Type": "application/octet-stream", **served.headers}
    request = urllib.request.Request(served.rest, body, headers)  # noqa: S310 (http on this machine)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return bool(answer.status == 200 and answer.read())  # noqa: PLR2004
    except (urllib.error.URLError, OSError):
        return False


def _end_all() -> None:
    """Ask the children to end, wait, and kill whatever is left of them and of their own."""
    this = psutil.Process()
    for patience in (END_S, 2.0):  # the children; then those that they have left behind
        children = this.children()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
        psutil.wait_procs(children, patience)
    while left := this.children(recursive=True):
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(left, 1.0)
