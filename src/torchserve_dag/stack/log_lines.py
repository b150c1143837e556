"""The logs of all processes of a project's server, read as one: entries in the order of their times."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from torchserve_dag.runtime.logs import CONTINUED

SOURCES = {
    "requests": "request", "refused": "refused", "front_door": "envoy", "ts_log": "torchserve", "console": "torchserve",
    "model_log": "worker", "access_log": "access",
}  # fmt: skip
"""A log's name → what writes it. A log of another name is named after itself."""
NOT_LINES = {"feedback", "scores", "ts_metrics", "model_metrics"}
"""Data, which `experiment` reads, or which `/metrics` has."""
FOLLOW_S = 0.3

_FILE = re.compile(r"(?P<base>\w+?)(?:\.\d+)?\.log(?:\.\d+)?(?P<gz>\.gz)?")
_WORKER_FILE = re.compile(r"(?P<base>worker)@(?P<name>[^@]+)@(?P<version>[^@]+)\.log(?:\.\d+)?")
"""Of the direct host's workers: see log_of in stack/worker_process.py."""
_TIME = re.compile(r"\[?(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)[.,](\d{3})\d*\]?")
_LOG4J = re.compile(r"\S+ \[\w+\s*\] (?P<thread>\S+) \S+ - (?P<message>.*)")
_WORKER = re.compile(r"W-\d+-(?P<name>.+)_(?P<version>[^_]+?)(?:-std(?:out|err))?")
_FAULT = re.compile(r"\bfault ([0-9a-f]{8})\b")


@dataclass(slots=True)
class Entry:
    """What was logged at one time: a line and its continuations, or a request."""

    time: dt.datetime
    source: str
    file: str
    text: str
    model: str | None = None
    version: str | None = None
    fields: dict[str, Any] | None = None
    """Of a request: everything that the front door wrote down."""

    @property
    def faults(self) -> set[str]:
        return set(_FAULT.findall(self.text))


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which entries are wanted."""

    model: str | None = None
    version: str | None = None
    request: str | None = None
    since: dt.datetime | None = None

    def has(self, entry: Entry) -> bool:
        """Whether an entry is one; the fault behind a request has to be looked up: see `read`."""
        if self.since and entry.time < self.since:
            return False
        if self.request and not re.search(rf"(?<![\w-]){re.escape(self.request)}(?![\w-])", _searched(entry)):
            return False
        if self.model is None:
            return True
        if entry.model is not None:
            return entry.model == self.model and self.version in {None, entry.version}
        name = f"{self.model}/{self.version}" if self.version else self.model
        return entry.fields is None and bool(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", entry.text))


def read(folder: Path, wanted: Wanted) -> list[Entry]:
    """The wanted entries of all logs, the oldest first; of a request, also the exception that failed it."""
    entries: list[Entry] = []
    causes: dict[str, list[Entry]] = {}
    for path in _files(folder):
        if wanted.since and _modified(path) < wanted.since.timestamp():
            continue
        with suppress(OSError, EOFError, zlib.error), _open(path) as lines:  # it may be renamed or written just now
            for entry in _Reader(path).entries(lines):
                if wanted.has(entry):
                    entries.append(entry)
                elif wanted.request and f"\n{CONTINUED}" in entry.text:
                    for fault in entry.faults:
                        causes.setdefault(fault, []).append(entry)
    entries.sort(key=lambda entry: entry.time)
    last = entries[-1].time if entries else None
    for fault in {fault for entry in entries for fault in entry.faults} if wanted.request else ():
        found = sorted(causes.get(fault, ()), key=lambda entry: entry.time)
        before = [cause for cause in found if last and cause.time <= last]
        entries += before[-1:] or found[:1]  # a fault has its traceback once a minute
    return sorted(entries, key=lambda entry: entry.time)


def follow(folder: Path, wanted: Wanted) -> Iterator[Entry]:
    """The wanted entries from now on, for ever."""
    open_files: dict[Path, tuple[int, IO[bytes], _Reader]] = {}
    begun = False
    while True:
        entries: list[Entry] = []
        for path in folder.glob("*.log"):
            if _base(path) is None or re.search(r"\.\d+\.log", path.name):
                continue
            with suppress(OSError):
                inode = path.stat().st_ino
                known = open_files.get(path)
                if known is None or known[0] != inode:
                    if known:  # it was rotated: its last lines first
                        entries += known[2].new(known[1])
                        known[1].close()
                    file = path.open("rb")
                    if not begun:
                        file.seek(0, 2)
                    known = open_files[path] = (inode, file, _Reader(path))
                entries += known[2].new(known[1])
        begun = True
        yield from sorted((entry for entry in entries if wanted.has(entry)), key=lambda entry: entry.time)
        time.sleep(FOLLOW_S)


def _files(folder: Path) -> list[Path]:
    files = [path for path in folder.iterdir() if _base(path) is not None]
    return sorted(files, key=_modified)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it was rotated away just now
        return 0.0


def _base(path: Path) -> str | None:
    match = _FILE.fullmatch(path.name) or _WORKER_FILE.fullmatch(path.name)
    return match["base"] if match and match["base"] not in NOT_LINES else None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


@dataclass(slots=True)
class _Reader:
    """Reads the lines of one log."""

    path: Path
    _last: dict[str, tuple[Entry, int]] = field(default_factory=dict)
    """The last entry of each thread, to which a continuation belongs, and in which call of `new` it was read."""
    _rest: bytes = b""
    _call: int = 0

    def entries(self, lines: IO[bytes]) -> list[Entry]:
        """All entries of a file."""
        found: list[Entry] = []
        for line in lines:
            self._add(line.decode("utf-8", "replace").rstrip("\r\n"), found)
        return found

    def new(self, file: IO[bytes]) -> list[Entry]:
        """The entries that were added to a file since the last call."""
        self._call += 1
        data = self._rest + file.read()
        whole, _, self._rest = data.rpartition(b"\n")
        found: list[Entry] = []
        for line in whole.decode("utf-8", "replace").split("\n") if whole else ():
            self._add(line, found)
        return found

    def _add(self, line: str, found: list[Entry]) -> None:
        base = _base(self.path) or ""
        source = SOURCES.get(base, base)
        if line.startswith("{"):
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                found.append(_request(json.loads(line), source, self.path.name))
            return
        at = _TIME.match(line)
        log4j = _LOG4J.fullmatch(line)
        thread = log4j["thread"] if log4j else ""
        text = log4j["message"] if log4j and base == "model_log" else line[at.end() :].strip() if at else line
        before, call = self._last.get(thread, (None, 0))
        if before and (at is None or text.startswith(CONTINUED)):
            text = text if text.startswith(CONTINUED) else CONTINUED + text
            if call == self._call:
                before.text += f"\n{text}"
            else:  # the entry is shown already
                found.append(Entry(before.time, source, self.path.name, text, before.model, before.version))
            return
        when = _local(*at.groups()) if at else dt.datetime.fromtimestamp(self.path.stat().st_mtime, dt.timezone.utc)
        worker = _WORKER.fullmatch(thread)
        worker = worker or _WORKER_FILE.fullmatch(self.path.name)
        model = (worker["name"], worker["version"]) if worker else (None, None)
        entry = Entry(when, source, self.path.name, text, *model)
        self._last[thread] = self._last[""] = (entry, self._call)  # a line without a time follows the last that has one
        found.append(entry)


def _request(fields: dict[str, Any], source: str, file: str) -> Entry:
    when = dt.datetime.fromisoformat(str(fields["time"]).replace("Z", "+00:00"))
    version = fields.get("version") or fields.get("first")
    name = f"{fields.get('model')}/{version}" if version else fields.get("path")
    failure = fields.get("grpc_failure")
    parts = [
        str(fields.get("status")) + (f" ({failure})" if failure else ""),
        f"{fields.get('method')} {name}",
        f"{fields.get('duration_ms')} ms",
        f"token {fields.get('token')}" if fields.get("token") else "",
        f"request {fields.get('request_id')}",
        str(fields["details"]) if fields.get("details") not in {None, "via_upstream"} else "",
    ]
    return Entry(when, source, file, "  ".join(filter(None, parts)), fields.get("model"), version, fields)


def _local(day: str, clock: str, milliseconds: str) -> dt.datetime:
    """The processes log in local time."""
    return dt.datetime.fromisoformat(f"{day}T{clock}.{milliseconds}").astimezone(dt.timezone.utc)


def _searched(entry: Entry) -> str:
    return entry.text if entry.fields is None else str(entry.fields.get("request_id"))
