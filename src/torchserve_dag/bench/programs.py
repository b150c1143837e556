"""The programs of the systems, with_*.py, and their metadata blocks (PEP 723)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.bench import toml
from torchserve_dag.bench.errors import BenchError
from torchserve_dag.runtime.data import plain

BARE = "bare"
"""The system without a server."""

_PREFIX = "with_"
_HEAD = re.compile(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$")  # as PEP 723 writes it


@dataclass(frozen=True, slots=True)
class Program:
    key: str
    """NAME of with_NAME.py."""
    path: str
    name: str
    """The name for people."""
    arrangement: str
    """How it runs here: processes, threads, batches."""
    dependencies: list[str]
    """The pinned packages that pip installs for it; without any, it runs with the project's own Python."""


@dataclass(frozen=True, slots=True)
class _Bench:
    name: str
    arrangement: str = ""


def find(folder: Path) -> list[Program]:
    """Every system's program, the bare loop among them. Raises BenchError."""
    programs = [read(path) for path in sorted(folder.glob(f"{_PREFIX}*.py"))]
    if not programs:
        raise BenchError(f"{folder} has no programs {_PREFIX}*.py.")
    return programs


def chosen(programs: list[Program], keys: list[str]) -> list[Program]:
    """The programs with these keys, or all, and always the bare loop, which is the baseline. Raises BenchError."""
    known = {program.key: program for program in programs}
    for key in keys:
        if key not in known:
            raise BenchError(f'There is no system "{key}"; {plain.did_you_mean(key, list(known))}')
    return [program for program in programs if not keys or program.key in keys or program.key == BARE]


def read(path: Path) -> Program:
    """Read a program's metadata block. Raises BenchError."""
    key = path.stem.removeprefix(_PREFIX)
    match = _HEAD.search(path.read_text("utf-8"))
    if match is None:
        raise BenchError(f"{path} has no metadata block (# /// script, PEP 723).")
    lines = (line[2:] if line.startswith("# ") else line[1:] for line in match["content"].splitlines())
    try:
        head = toml.parse("\n".join(lines))
        tool = head.get("tool", {}).get("bench", {})
        bench = plain.build(_Bench, {"name": key} | {k: v for k, v in tool.items() if k in {"name", "arrangement"}})
        pins = plain.build(list[str], head.get("dependencies", []))
    except (ValueError, AttributeError, plain.WrongDataError) as error:
        raise BenchError(f"{path}: its metadata block is wrong: {error}.") from None
    return Program(key, str(path), bench.name, bench.arrangement, pins)
