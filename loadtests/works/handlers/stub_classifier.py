"""A classifier whose cost is known: it calls an object by its number."""

from __future__ import annotations

import fcntl
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from torchserve_dag import Handler, NoSettings, Placement


class StubClassifier(Handler[int, int, int, str]):
    """Object → its name. It shares the detector's device: 4 ms a batch, and 0.1 ms an item."""

    def load(self, folder: Path, settings: NoSettings, placement: Placement) -> None:  # noqa: ARG002 (the contract's)
        self.device = Path(tempfile.gettempdir()) / "stub-device.lock"

    def example(self) -> int:
        return 1

    def preprocess(self, item: int) -> int:
        return item

    def infer(self, batch: Sequence[int]) -> Sequence[int]:
        with self.device.open("w") as device:
            fcntl.flock(device, fcntl.LOCK_EX)  # until the file is closed
            time.sleep(0.004 + 0.0001 * len(batch))
        return batch

    def postprocess(self, output: int, item: int) -> str:  # noqa: ARG002
        return f"object {output}"
