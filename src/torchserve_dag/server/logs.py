"""Find the cause of a failure in the logs of this run."""

from __future__ import annotations

import re
from pathlib import Path

_RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b.*")
_STARTED = "Torch worker started."
_AT = re.compile(r"^\S+ \[\w+\s*\] (?P<thread>\S+) \S+ - (?P<message>.*)$")


class Logs:
    """The logs in a folder, without the lines that earlier runs wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._starts = {path.name: path.stat().st_size for path in folder.glob("*.log")}

    def worker_failure(self, name: str, version: str) -> str | None:
        """Why a worker of a model ended: the first exception of its last failed start, which caused those after it."""
        model = re.compile(rf"W-\d+-{re.escape(name)}_{re.escape(version)}-std(out|err)")
        events = [at for line in self._lines("model_log.log") if (at := _AT.match(line))]
        messages = [at["message"] for at in events if model.match(at["thread"])]
        starts = [i for i, line in enumerate(messages) if line == _STARTED]
        for start in reversed(starts or [0]):  # the last start may not have failed yet
            raised = next((line for line in messages[start:] if _RAISED.match(line)), None)
            if raised:
                return raised
        return messages[-1] if messages else None

    def archive_failure(self, archive: str) -> str | None:
        """Why TorchServe did not accept an archive."""
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
            file.seek(start if start <= path.stat().st_size else 0)  # the file was rotated since
            return file.read().decode("utf-8", "replace").splitlines()
