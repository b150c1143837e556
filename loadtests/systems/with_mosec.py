# /// script
# dependencies = ["mosec==0.9.8"]
# [tool.bench]
# name = "Mosec"
# arrangement = """\
# Photos: the whole work in 2 workers x 1 thread, without batches; stub and chains: a stage a worker process, the \
# stub's with batches of 32 that wait 1 ms (mosecorg.github.io/mosec/reference/concept.html and interface.html)."""
# ///
"""Mosec: each stage a worker, or the whole work in two."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import contract
import mosec
import works

WORKFLOW, STAGE = "BENCH_WORKFLOW", "BENCH_STAGE"
"""Where a worker, a process of its own, finds which workflow is served, and which of its stages is the worker's."""


class Whole(mosec.Worker):
    """Bodies in, answers out."""

    def __init__(self) -> None:
        super().__init__()
        work = works.work(Path(os.environ[WORKFLOW]))
        if work.computes:
            works.use_threads(1)
        self.step = self.load(work)

    def load(self, work: works.Work) -> works.Step:
        return work.load()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: Any) -> Any:
        return self.step(data) if self.max_batch_size > 1 else self.step([data])[0]

    def serialize(self, data: bytes) -> bytes:
        return data


class Part(Whole):
    """One stage."""

    def load(self, work: works.Work) -> works.Step:
        return work.stages[int(os.environ[STAGE])].load()


def serve(workflow: Path, port: int) -> None:
    os.environ |= {
        WORKFLOW: str(workflow),
        "MOSEC_ADDRESS": "127.0.0.1",
        "MOSEC_PORT": str(port),
        "MOSEC_TIMEOUT": "60000",
        "MOSEC_LOG_LEVEL": "warning",
    }
    server = mosec.Server()
    work = works.work(workflow)
    if work.computes:
        server.append_worker(Whole, num=2)
    else:
        batch = works.STUB_BATCH if work.name == "stub" else 1
        for place in range(len(work.stages)):
            server.append_worker(Part, max_batch_size=batch, max_wait_time=1, env=[{STAGE: str(place)}])
    server.run()


if __name__ == "__main__":
    contract.main(serve, "/inference", metrics="/metrics")
