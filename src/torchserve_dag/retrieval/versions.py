"""The versions of a project's indexes: listed, chosen, deleted when they are old."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.archives import atomic
from torchserve_dag.retrieval.documents import IndexingError
from torchserve_dag.runtime.data.plain import WrongDataError
from torchserve_dag.runtime.retrieval.folder import About, IndexFolder

PART = ".part"
"""The suffix of what is being written, or deleted."""


@dataclass(frozen=True, slots=True)
class IndexVersionState:
    """A version of an index, as `torchserve-dag index --list` has it."""

    index: str
    version: int
    current: bool
    """Whether it is the version that answers."""
    created: str
    documents: int
    passages: int
    embedding: str
    folder: str
    bytes: int
    """On disk."""


def states(root: Path, name: str | None = None) -> list[IndexVersionState]:
    """The versions of an index, or of all of a project."""
    folder = IndexFolder.of(root, name or "any").path.parent
    names = [name] if name else sorted(path.name for path in folder.glob("*") if path.is_dir())
    indexes = [IndexFolder(folder / one) for one in names]
    return [_state(index, version) for index in indexes for version in index.versions()]


def _state(index: IndexFolder, version: int) -> IndexVersionState:
    about, here = about_of(index, version), index.of_version(version)
    size = sum(path.stat().st_size for path in here.rglob("*") if path.is_file())
    return IndexVersionState(
        index.name,
        version,
        index.current() == version,
        about.created,
        len(about.documents),
        about.passages,
        about.embedding,
        about.folder,
        size,
    )


def about_of(index: IndexFolder, version: int) -> About:
    """Raises IndexingError."""
    try:
        return index.about(version)
    except (OSError, ValueError, WrongDataError):
        what = f"{index.of_version(version)} is no version of an index, or a damaged one"
        raise IndexingError(f"{what}: delete the folder.") from None


def rollback(root: Path, name: str, version: int) -> About:
    """Choose the version that answers. Servers follow within a second. Raises IndexingError."""
    index = IndexFolder.of(root, name)
    versions = index.versions()
    if version not in versions:
        there = f"it has {', '.join(map(str, versions))}" if versions else "there is no such index"
        raise IndexingError(f"The index {name} has no version {version}: {there}.")
    with locked(index):
        about = about_of(index, version)
        choose(index, version)
        return about


def choose(index: IndexFolder, version: int) -> None:
    atomic.write_text(index.current_file, f"{version}\n")


def delete_old(index: IndexFolder, keep: int) -> list[int]:
    """Delete all but the newest versions and the current one. Returns those that were deleted."""
    old = [version for version in index.versions()[:-keep] if version != index.current()]
    for version in old:
        gone = index.path / f".{version}{PART}"
        index.of_version(version).rename(gone)  # whole at once: no reader finds half of it
        shutil.rmtree(gone)
    return old


@contextmanager
def locked(index: IndexFolder) -> Iterator[None]:
    """Only one process changes an index at a time. What an earlier one left half done is deleted.

    Raises IndexingError where another one changes it now.
    """
    index.path.mkdir(parents=True, exist_ok=True)
    with (index.path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"Another process changes the index {index.name} now: wait until it has ended."
            raise IndexingError(what) from None
        for path in index.path.glob(f".*{PART}"):
            shutil.rmtree(path)
        yield
