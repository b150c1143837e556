"""Find the cause of a failure in the logs of this run."""

from __future__ import annotations

import gzip
import re
import time
import zlib
from pathlib import Path

from torchserve_dag.runtime.logs import CONTINUED

LINES = 4
"""How many lines of an exception are quoted: torch's first line on weights that do not fit is only a heading."""
_RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b.*")
_STARTED = "Torch worker started."
_AT = re.compile(r"^\S+ \[\w+\s*\] (?P<thread>\S+) \S+ - (?P<message>.*)$")


class Logs:
    """The logs in a folder, without the lines that were written before this object was made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._begin_ns = time.time_ns()
        self._starts = {path.name: _position(path) for path in folder.glob("*.log")}

    def worker_failure(self, name: str, version: str) -> str | None:
        """Why a worker of a model ended: the first exception of its last failed start, which caused those after it."""
        model = re.compile(rf"W-\d+-{re.escape(name)}_{re.escape(version)}-std(out|err)")
        messages = self._messages("model_log.log", model)
        starts = [i for i, line in enumerate(messages) if line == _STARTED]
        for start in reversed(starts or [0]):  # the last start may not have failed yet
            first = next((i for i in range(start, len(messages)) if _RAISED.match(messages[i])), None)
            if first is not None:
                return _sentence(messages[first : first + LINES])
        thread = self._thread(name, version)
        lines = self._lines("ts_log.log")  # a process that cannot be started has no output of its own
        for i, line in enumerate(lines):
            if (at := _AT.match(line)) and thread.match(at["thread"]):
                raised = next((after for after in lines[i + 1 : i + 3] if _RAISED.match(after)), None)
                if raised:
                    return raised
        return messages[-1] if messages else None

    def failed_again(self, name: str, version: str) -> int:
        """How often TorchServe has written that a worker of this version failed once more, after its first failure."""
        return self._messages("ts_log.log", self._thread(name, version)).count("Auto recovery failed again")

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

    @staticmethod
    def _thread(name: str, version: str) -> re.Pattern[str]:
        return re.compile(rf"W-\d+-{re.escape(name)}_{re.escape(version)}\Z")

    def _messages(self, log: str, thread: re.Pattern[str]) -> list[str]:
        events = [at for line in self._lines(log) if (at := _AT.match(line))]
        return [at["message"].removeprefix(CONTINUED) for at in events if thread.match(at["thread"])]

    def _lines(self, name: str) -> list[str]:
        """The lines of a log since this object was made; log4j may have moved some of them to NAME.1.log.gz."""
        path = self.folder / name
        inode, skip = self._starts.get(name, (0, 0))
        zipped = [older for older in self.folder.glob(f"{path.stem}.*.gz") if _time_ns(older) >= self._begin_ns]
        parts = [_unzipped(older) for older in sorted(zipped, key=_time_ns)]
        now, size = _position(path)
        if parts:
            parts[0] = parts[0][skip:]
        grew = not parts and now == inode and size >= skip
        parts.append(_read(path, skip if grew else 0))
        return b"".join(parts).decode("utf-8", "replace").splitlines()


def _position(path: Path) -> tuple[int, int]:
    """A file's inode and size; zeros for a file that is not there."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_size


def _time_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # log4j renames it
        return 0


def _read(path: Path, start: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read()
    except OSError:
        return b""


def _unzipped(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error):  # it is being written, or renamed
        return b""


def _sentence(lines: list[str]) -> str:
    """An exception's first line, with those after it that it announces with a colon."""
    text, *more = lines
    while text.endswith(":") and more:
        text = f"{text} {more.pop(0).strip()}"
    return text
