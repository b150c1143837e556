"""Archives in a folder: each version has its place, appears only when it is complete, and never changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchserve_dag.archives import atomic, mar
from torchserve_dag.archives.mar import BUILD, Entries
from torchserve_dag.archives.stamp import OWN
from torchserve_dag.runtime.data.source import CheckError, Source
from torchserve_dag.runtime.project.modules import FOLDERS


@dataclass(frozen=True, slots=True)
class Target:
    """A handler's or a workflow's file, and the archive that it is built into."""

    folder: str
    file: Source[Any]
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}-{self.version}.mar"


NEW_OR_FORCE = "give it a new version, or --force if it is neither served nor decided on"

State = Literal["built", "unchanged", "kept", "replaced"]


@dataclass(frozen=True, slots=True)
class Built:
    name: str
    version: str
    path: Path
    size: int
    """In bytes."""
    state: State
    """`kept`: built from the same project by another version of this package, or with other packages."""
    note: str = ""
    """For a kept archive: what differs, and how to build it again."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What of a project an archive was built from."""

    files: Entries
    """Its handlers, workflows and modules, and archives that nodes run."""
    weights: Mapping[str, str]
    """The SHA-256 of each file or folder of weights."""


def refuse_other_input(target: Target, path: Path, origin: Origin) -> None:
    """Raises CheckError if the archive at `path` was built from another origin: a version never changes."""
    if path.exists() and ((built := _read(path)) is None or built.origin != origin):
        what = f"{path.name} is already built from other input"
        raise CheckError([target.file.problem(("version",), what, f"it never changes: {NEW_OR_FORCE}")])


def place(
    target: Target,
    path: Path,
    write: Callable[[Path], None],
    *,
    origin: Origin | None,
    force: bool,
    same_project: bool = False,
    fixed: str | None = None,
) -> Built:
    """Write an archive with `write`, and move it to `path`, unless an archive of the same files is there already.

    An existing archive stays as it is if it has the same origin. A `.war` contains no file of the project and has no
    `origin`: it stays if its archives did (`same_project`). Without `force`, raises CheckError for another origin.
    Not even `force` replaces an archive that is `fixed`: why, as the end of a sentence.
    """
    if origin and not force:
        refuse_other_input(target, path, origin)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.part_of(path) as part:
        write(part)
        state: State = "built"
        if path.exists():
            old, new = _read(path), _read(part)
            if old == new:
                return Built(target.name, target.version, path, path.stat().st_size, "unchanged")
            if old and new and not force and (origin or same_project):
                note = f"{_difference(old, new)}: to build it again, {NEW_OR_FORCE}"
                return Built(target.name, target.version, path, path.stat().st_size, "kept", note)
            if fixed:
                help_ = "a version never changes once it is served or decided on: give it a new one"
                raise CheckError([target.file.problem(("version",), f"{path.name} {fixed}", help_)])
            state = "replaced"
        part.replace(path)
    return Built(target.name, target.version, path, path.stat().st_size, state)


@dataclass(frozen=True)
class _Read:
    """The content of an archive, without the commit, which may differ."""

    origin: Origin
    """Empty in a `.war`."""
    runtime: Entries
    """The copy of this package."""
    generated: Entries
    """The files that this package generated from both, except `build.json`."""
    build: dict[str, Any]
    """`build.json`, empty in a `.war`."""


def _read(path: Path) -> _Read | None:
    """Read an archive; None if the file is not one."""
    try:
        entries = mar.checksums(path)
        build = mar.read_json(path, BUILD) if BUILD in entries else {}
        build.get("inputs", {}).pop("commit", None)
        digests = dict(build.get("inputs", {}).get("weights", {}))
    except (OSError, ValueError, AttributeError, TypeError, mar.BadArchiveError):
        return None
    parts: dict[str, Entries] = {"project": {}, "weights": {}, "runtime": {}, "generated": {}}
    for entry, checksum in entries.items():
        if entry != BUILD:
            parts[part_of_archive(entry)][entry] = checksum
    return _Read(Origin(parts["project"], digests), parts["runtime"], parts["generated"], build)


def part_of_archive(entry: str) -> Literal["project", "weights", "runtime", "generated"]:
    """Where a file in an archive comes from."""
    folder = entry.partition("/")[0]
    if folder in PROJECT:
        return "project"
    return "weights" if folder == "weights" else "runtime" if folder == "torchserve_dag" else "generated"


PROJECT = (*FOLDERS, "src")
"""An archive's folders with files of the project, besides its weights."""


def _difference(old: _Read, new: _Read) -> str:
    """How a kept archive's build differed from today's: the beginning of a sentence."""
    if not old.build:
        return "built by an earlier torchserve-dag"
    before, now = (archive.build["inputs"]["packages"] for archive in (old, new))
    own = f"torchserve-dag {before.get(OWN, 'of an unknown version')}"
    if old.runtime != new.runtime:
        return f"built with an earlier runtime ({own}), which it carries"
    names = [name for name in sorted({*before, *now} - {OWN}) if before.get(name) != now.get(name)]
    if names:
        changes = [
            f"{name} {before.get(name, 'not installed')}, now {now.get(name, 'not installed')}" for name in names
        ]
        return f"built with other packages ({'; '.join(changes)})"
    return f"built by an earlier {own}"
