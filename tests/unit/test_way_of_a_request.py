"""The way of a request that docs/architecture.md describes is the way that a request takes."""

from __future__ import annotations

import re
import socket
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from tests.unit.front_end import FrontEnd
from torchserve_dag.runtime.worker.service import load
from torchserve_dag.runtime.worker.torchserve.batched import BatchedLoop

ROOT = Path(__file__).parents[2]
RUNTIME = ROOT / "src" / "torchserve_dag" / "runtime"
ROW = re.compile(r"^\| \d+ \| `([\w./]+)` \| (.*?) \|", re.MULTILINE)


def test_a_request_passes_the_files_and_functions_of_the_page(project: Path) -> None:
    """In the order of the page, and at most ten files."""
    rows = ROW.findall((ROOT / "docs" / "architecture.md").read_text("utf-8"))
    named = [(file, function) for file, functions in rows for function in re.findall(r"(\w+)`", functions)]
    passed = [one for one in dict.fromkeys(_called(project)) if one in named]

    assert len(rows) <= 10
    assert passed == named


def _called(project: Path) -> list[tuple[str, str]]:
    """The file and the name of every function that runs for one request, in order."""
    called: list[tuple[str, str]] = []
    recording = threading.Event()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if not recording.is_set() or event != "call":
            return
        path = Path(frame.f_code.co_filename)
        name = frame.f_code.co_name
        if path.is_relative_to(RUNTIME):
            called.append((str(path.relative_to(RUNTIME)), name))
        elif path.is_relative_to(project):
            called.append(("handlers/NAME.py", name))

    (project / "build.json").write_text('{"file": "handlers/upper.yaml", "kind": "handler"}')
    threading.setprofile(profile)
    ours, theirs = socket.socketpair()
    loop = BatchedLoop(load(project, None))
    threading.Thread(target=loop.run, args=(theirs,), daemon=True).start()
    threading.setprofile(None)
    front_end = FrontEnd(ours)
    try:
        for request, records in (("warm", False), ("traced", True)):
            if records:
                time.sleep(0.1)  # the threads have returned from the request before
                recording.set()
            front_end.ask(request, b"hello")
            assert front_end.part(request).json == {"text": "HELLO"}
    finally:
        recording.clear()
        front_end.close()
        loop.close()
    return called
