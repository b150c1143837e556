"""A detector whose cost is known: it finds as many objects as its request asks for."""

from __future__ import annotations

import fcntl
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchserve_dag import Handler, NoSettings, Placement


@dataclass(frozen=True, slots=True)
class Scene:
    objects: int


class StubDetector(Handler[Scene, int, int, list[int]]):
    """Scene → its objects, which are numbers. One batch at a time, on the whole machine: 4 ms, and 0.1 ms an item."""

    def load(self, folder: Path, settings: NoSettings, placement: Placement) -> None:  # noqa: ARG002 (the contract's)
        self.device = Path(tempfile.gettempdir()) / "stub-device.lock"

    def example(self) -> Scene:
        return Scene(2)

    def preprocess(self, item: Scene) -> int:
        return item.objects

    def infer(self, batch: Sequence[int]) -> Sequence[int]:
        with self.device.open("w") as device:
            fcntl.flock(device, fcntl.LOCK_EX)  # until the file is closed
            time.sleep(0.004 + 0.0001 * len(batch))
        return batch

    def postprocess(self, output: int, item: Scene) -> list[int]:  # noqa: ARG002
        return list(range(output))
