"""Archives in a folder: each version has its place, is seen only when it is whole, and never changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchserve_dag.archives import atomic, mar
from torchserve_dag.archives.mar import BUILD
from torchserve_dag.runtime.data.source import CheckError, Source


@dataclass(frozen=True, slots=True)
class Target:
    """A handler's or a workflow's file, and the archive that it is built into."""

    folder: str
    file: Source[Any]
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}-{self.version}.mar"


@dataclass(frozen=True, slots=True)
class Built:
    name: str
    version: str
    path: Path
    size: int
    """In bytes."""
    state: Literal["built", "unchanged", "replaced"]


def place(target: Target, path: Path, write: Callable[[Path], None], *, force: bool) -> Built:
    """Put what `write` writes at `path`, unless it is there already. Raises CheckError for other content there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.part_of(path) as part:
        write(part)
        state: Literal["built", "unchanged", "replaced"] = "built"
        if path.exists():
            if _same(part, path):
                return Built(target.name, target.version, path, path.stat().st_size, "unchanged")
            if not force:
                what = f"{path.name} is already built from other input"
                help_ = "a version never changes: give it a new one, or use --force while developing"
                raise CheckError([target.file.problem(("version",), what, help_)])
            state = "replaced"
        part.replace(path)
    return Built(target.name, target.version, path, path.stat().st_size, state)


def _same(part: Path, path: Path) -> bool:
    """Whether an archive differs from the one that is there in nothing but the commit."""
    try:
        return mar.same_content(part, path, ignoring=BUILD) and _but_commit(part) == _but_commit(path)
    except (OSError, ValueError, KeyError, TypeError, mar.BadArchiveError):
        return False


def _but_commit(path: Path) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(mar.read_text(path, BUILD))
    except KeyError:  # a .war has none: its archives have
        return {}
    fields["inputs"].pop("commit", None)
    return fields
