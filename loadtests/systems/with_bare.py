# /// script
# dependencies = []
# [tool.bench]
# name = "No server"
# arrangement = """\
# As many processes and threads as its options say, each with the whole work, called in a loop: what this machine \
# does where serving costs nothing."""
# ///
"""The bare loop: the work as fast as plain Python can do it, with no server.

python loadtests/systems/with_bare.py WORKFLOW.yaml --bodies FOLDER --seconds S --processes P --threads T --batch B
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import works

WARM_S = 2.0
"""How long a process runs before it is measured."""


@dataclass(frozen=True, slots=True)
class Loop:
    """What one process does."""

    workflow: Path
    bodies: list[bytes]
    seconds: float
    threads: int
    batch: int

    def run(self, number: int, parent: Connection) -> None:
        """Load, warm up, say so; when told to, call the work for `seconds`, and give each call's requests and ms."""
        work = works.work(self.workflow)
        if work.computes:
            works.use_threads(self.threads)
        step = work.load()
        calls = self._calls(number)
        end = time.perf_counter() + WARM_S
        while time.perf_counter() < end:
            step(next(calls))
        parent.send(None)
        parent.recv()
        latencies_ms = []
        now = time.perf_counter()
        end = now + self.seconds
        while now < end:
            before = now
            step(next(calls))
            now = time.perf_counter()
            latencies_ms.append(1000 * (now - before))
        parent.send(latencies_ms)
        parent.recv()  # its memory is still to be read

    def _calls(self, number: int) -> Iterator[list[bytes]]:
        """Batches of bodies without end; each process begins at another."""
        bodies = itertools.islice(itertools.cycle(self.bodies), number, None)
        while True:
            yield list(itertools.islice(bodies, self.batch))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--bodies", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exit ends the processes; the signal alone does not
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    bodies = [path.read_bytes() for path in sorted(options.bodies.iterdir()) if path.is_file()]
    loop = Loop(options.workflow.resolve(), bodies, options.seconds, options.threads, options.batch)
    sys.stdout.write(json.dumps(_measured(loop, options.processes)) + "\n")


def _measured(loop: Loop, processes: int) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    began = time.perf_counter()
    pipes = [spawn.Pipe() for _ in range(processes)]
    children = [
        spawn.Process(target=loop.run, args=(number, theirs), daemon=True) for number, (_, theirs) in enumerate(pipes)
    ]
    for child, (_, theirs) in zip(children, pipes, strict=True):
        child.start()
        theirs.close()  # so that a child that ends is noticed
    ours = [pipe for pipe, _ in pipes]
    for pipe in ours:
        pipe.recv()
    startup = time.perf_counter() - began - WARM_S
    for pipe in ours:
        pipe.send(None)
    began = time.perf_counter()
    latencies_ms = [one for pipe in ours for one in pipe.recv()]
    seconds = time.perf_counter() - began
    memory = sum(psutil.Process(child.pid).memory_full_info().pss for child in children)
    memory += psutil.Process().memory_full_info().pss
    for pipe in ours:
        pipe.send(None)
    for child in children:
        child.join()
    return {
        "requests": len(latencies_ms) * loop.batch,
        "seconds": round(seconds, 3),
        "latencies_ms": [round(one, 3) for one in latencies_ms],
        "memory_mb": round(memory / 2**20),
        "startup_s": round(startup, 2),
    }


if __name__ == "__main__":
    main()
