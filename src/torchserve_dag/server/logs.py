"""What the logs of this run say of a failure, in one line."""

from __future__ import annotations

import re
from pathlib import Path

_RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b.*")
_STARTED = "Torch worker started."
_AT = re.compile(r"^\S+ \[\w+\s*\] (?P<thread>\S+) \S+ - (?P<said>.*)$")


class Logs:
    """The logs in a folder, from this moment on: earlier runs wrote there too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._starts = {path.name: path.stat().st_size for path in folder.glob("*.log")}

    def worker_failure(self, name: str, version: str) -> str | None:
        """What ended a worker of a model: the first exception of its last failure, which the others followed from."""
        model = re.compile(rf"W-\d+-{re.escape(name)}_{re.escape(version)}-std(out|err)")
        events = [at for line in self._lines("model_log.log") if (at := _AT.match(line))]
        said = [at["said"] for at in events if model.match(at["thread"])]
        starts = [i for i, line in enumerate(said) if line == _STARTED]
        for start in reversed(starts or [0]):  # the last may not have failed yet
            raised = next((line for line in said[start:] if _RAISED.match(line)), None)
            if raised:
                return raised
        return said[-1] if said else None

    def archive_failure(self, archive: str) -> str | None:
        """Why TorchServe did not take an archive."""
        lines = self._lines("ts_log.log")
        for i, line in enumerate(lines):
            if "Failed to load model" in line and line.endswith(f"/{archive}"):
                return next((after for after in lines[i + 1 :] if _RAISED.match(after)), line)
        return None

    def server_failure(self) -> str | None:
        """Why TorchServe itself ended."""
        lines = [line for line in self._lines("console.log") if line.strip()]
        raised = [line.removeprefix("Caused by: ") for line in lines if _RAISED.match(line.removeprefix("Caused by: "))]
        invalid = [line for line in lines if line.startswith(("Invalid", "Error", "--"))]
        return next(iter(raised or invalid or lines[-1:]), None)

    def _lines(self, name: str) -> list[str]:
        path = self.folder / name
        if not path.is_file():
            return []
        start = self._starts.get(name, 0)
        with path.open("rb") as file:
            file.seek(start if start <= path.stat().st_size else 0)  # it was rolled since
            return file.read().decode("utf-8", "replace").splitlines()
