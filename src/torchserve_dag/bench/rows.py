"""What a benchmark writes while it runs: one line of JSON for each thing measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torchserve_dag.bench.errors import BenchError
from torchserve_dag.bench.window import Counts
from torchserve_dag.clients.address import Protocol
from torchserve_dag.runtime.data import plain


@dataclass(frozen=True, slots=True)
class SystemRow:
    """One start of a system; written after its loads, so a start without this row is incomplete."""

    round: int
    work: str
    system: str
    startup_s: float | None = None
    memory_mb: float | None = None
    """The memory of all its processes after its loads; shared pages count once (PSS)."""
    problem: str | None = None
    """Why the measurement failed."""


@dataclass(frozen=True, slots=True)
class LoadRow:
    """One load of a system."""

    round: int
    work: str
    system: str
    protocol: Protocol
    counts: Counts
    cpu_ms: float
    """The system's CPU time for each answer."""
    clients: int | None = None
    """The number of clients of a closed loop."""
    percent: int | None = None
    """The rate of an open loop, in per cent of the best closed loop of this start and protocol."""
    rate: float | None = None
    """The rate of an open loop, in arrivals per second."""
    batches: dict[str, float] = field(default_factory=dict)
    """The mean batch of each node, if the system has such a metric."""


@dataclass(frozen=True, slots=True)
class BareRow:
    """One arrangement of the bare loop."""

    round: int
    work: str
    arrangement: str
    rps: float = 0.0
    p50_ms: float | None = None
    p99_ms: float | None = None
    memory_mb: float | None = None
    startup_s: float | None = None
    problem: str | None = None


Row = SystemRow | LoadRow | BareRow

_KINDS: dict[str, type[Row]] = {"system": SystemRow, "load": LoadRow, "bare": BareRow}


def append(path: Path, rows: Iterable[Row]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(_line(row) for row in rows)


def write(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(map(_line, rows)), "utf-8")


def read(path: Path) -> list[Row]:
    """Read rows; a last line that was cut off is skipped. Raises BenchError."""
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True)
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        return [_row(line) for line in lines if line.endswith("\n")]
    except (ValueError, KeyError, plain.WrongDataError) as error:
        raise BenchError(f"{path} is damaged: {error}.") from None


def complete(rows: Iterable[Row]) -> list[Row]:
    """The rows without the loads of starts that did not complete."""
    rows = list(rows)
    ended = {(row.round, row.work, row.system) for row in rows if isinstance(row, SystemRow)}
    return [row for row in rows if not isinstance(row, LoadRow) or (row.round, row.work, row.system) in ended]


def _line(row: Row) -> str:
    kind = next(kind for kind, of in _KINDS.items() if isinstance(row, of))
    return json.dumps({"kind": kind, **plain.flatten(row)}) + "\n"


def _row(line: str) -> Row:
    fields = json.loads(line)
    return plain.build(_KINDS[fields.pop("kind")], fields)
