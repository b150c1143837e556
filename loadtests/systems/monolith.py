"""A TorchServe handler as its users write them: everything that one request needs, in one class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import works


class Monolith:
    def __init__(self) -> None:
        self.initialized = False

    def initialize(self, context: Any) -> None:  # noqa: ARG002 (TorchServe's)
        work = works.work(Path(os.environ["BENCH_WORKFLOW"]))
        if work.computes:
            works.use_threads(1)
        self.step = work.load()
        self.initialized = True

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:  # noqa: ARG002
        return self.step([bytes(row.get("data") or row.get("body") or b"") for row in data])
