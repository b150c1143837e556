"""A model archive of TorchServe's: what its manifest names, its files on disk, and whether its handler streams."""

from __future__ import annotations

import ast
import fcntl
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from torchserve_dag.runtime.data import unzip

MANIFEST = "MAR-INF/MANIFEST.json"
_STREAMS = "send_intermediate_predict_response"
"""The function of TorchServe's that a handler calls to send a chunk."""
_ERRORS = (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError, RecursionError)


def handler_of(archive: Path) -> str | None:
    """The handler that a `.mar` names, or a folder with what is in one; None where it is no archive."""
    try:
        return str(json.loads(_read(archive, MANIFEST))["model"]["handler"]) or None
    except _ERRORS:
        return None


def streams(archive: Path) -> bool:
    """Whether the archive's own code sends answers in chunks."""
    return any(_STREAMS in _names(file) for file in _python_files(archive))


def unpacked(archive: Path, kept_in: Path | None) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    """The folder with an archive's files, and the object that deletes it, unless it is to stay.

    `kept_in`: a folder in which it stays, for all workers and for those that are started after them. So a worker that
    is killed leaves nothing behind.
    """
    if archive.is_dir():
        return archive.absolute(), None
    if kept_in is None:
        folder = tempfile.TemporaryDirectory(prefix=f"{archive.stem}-", ignore_cleanup_errors=True)
        unzip.extract(archive, Path(folder.name))
        return Path(folder.name), folder
    target = kept_in.absolute() / f".{archive.name}"
    with (kept_in / f".{archive.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            part = target.with_name(f"{target.name}.part")
            shutil.rmtree(part, ignore_errors=True)  # of a worker that was killed
            unzip.extract(archive, part)
            part.rename(target)
    return target, None


def _read(archive: Path, name: str) -> bytes:
    """A small file of an archive. Raises one of _ERRORS."""
    if archive.is_dir():
        if (archive / name).stat().st_size > unzip.MAX_FILE:
            raise ValueError(f"{name} is larger than {unzip.MAX_FILE:,} bytes")
        return (archive / name).read_bytes()
    return unzip.read(archive, name)


def _python_files(archive: Path) -> Iterator[str]:
    """The text of the archive's Python files, without an archive of ours' copy of this package."""
    try:
        if archive.is_dir():
            names = [path.relative_to(archive).as_posix() for path in archive.rglob("*.py")]
        else:
            names = [entry.filename for entry in unzip.entries(archive) if entry.filename.endswith(".py")]
    except _ERRORS:
        return
    for name in names:
        if PurePosixPath(name).parts[0] != "torchserve_dag":
            with suppress(*_ERRORS):
                yield _read(archive, name).decode("utf-8", "replace")


def _names(text: str) -> set[str]:
    """The names that a Python file calls."""
    if _STREAMS not in text:
        return set()
    try:
        calls = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    except (SyntaxError, ValueError, RecursionError):
        return set()
    return {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
