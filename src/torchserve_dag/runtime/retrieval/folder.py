"""The folder of an index, `indexes/NAME/`: a folder for each version, and which of them is the current one.

A version is whole and never changes, so another one is chosen by writing a file of a few bytes, and an old one may be
deleted at any time.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.project.home import home_of

INDEXES = "TORCHSERVE_DAG_INDEXES"
"""The environment variable with the folder of all indexes, where that is not the project's `indexes/`."""
TABLE = "passages"
CURRENT, ABOUT = "current", "index.json"
FORMAT = 1
"""Of `index.json` and the table's columns: another one is built anew."""


@dataclass(frozen=True, slots=True)
class Indexed:
    """A document of an index."""

    sha256: str
    """Of the file, when it was read."""
    passages: int
    """How many passages it was split into."""


@dataclass(frozen=True, slots=True)
class About:
    """What `index.json` says of a version."""

    name: str
    """The index's name."""
    version: int
    """Counted from 1; never given twice."""
    created: str
    """When, in UTC."""
    folder: str
    """The folder of the documents, from the project's root where it lies in the project."""
    embedding: str
    """The handler that embeds its passages, and questions: `NAME/VERSION`."""
    fingerprint: str
    """The SHA-256 of all that decides on a document's passages and their vectors, except the document."""
    width: int
    """How many numbers a vector has."""
    passages: int
    """How many there are, of all documents."""
    documents: dict[str, Indexed] = field(default_factory=dict)
    """By their paths, from the folder around the documents' folder."""
    format: int = FORMAT
    """Of this file, and of the table beside it."""


@dataclass(frozen=True, slots=True)
class IndexFolder:
    """`indexes/NAME/`, whether it is there or not."""

    path: Path

    @classmethod
    def of(cls, root: Path, name: str) -> IndexFolder:
        """Of the project at `root`, which may be an unpacked archive."""
        named = os.environ.get(INDEXES)
        return cls((Path(named) if named else home_of(root) / "indexes") / name)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def current_file(self) -> Path:
        return self.path / CURRENT

    def current(self) -> int | None:
        """The version that answers; None where there is none."""
        try:
            version = int(self.current_file.read_text("ascii"))
        except (OSError, ValueError):
            return None
        return version if self.of_version(version).is_dir() else None

    def of_version(self, version: int) -> Path:
        return self.path / str(version)

    def versions(self) -> list[int]:
        """The versions that are there, oldest first."""
        if not self.path.is_dir():
            return []
        return sorted(int(path.name) for path in self.path.iterdir() if path.name.isdecimal() and path.is_dir())

    def about(self, version: int) -> About:
        """What a version says of itself. Raises OSError, and ValueError for a file that is not ours."""
        data: Any = json.loads((self.of_version(version) / ABOUT).read_bytes())
        return plain.build(About, data)
