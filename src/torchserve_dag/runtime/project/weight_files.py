"""The files of weights, and their SHA-256."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path


def sha256(path: Path) -> str:
    """The sha256 of a file; of a folder, that of its sorted `sha256sum` lines.

    By hand: `(cd FOLDER && find * -type f | xargs sha256sum | LC_ALL=C sort | sha256sum)`.
    """
    if path.is_dir():
        lines = sorted(f"{_of_file(file)}  {file.relative_to(path).as_posix()}\n".encode() for file in files(path))
        return hashlib.sha256(b"".join(lines)).hexdigest()
    return _of_file(path)


def files(path: Path) -> list[Path]:
    """The files of a folder of weights, or the file itself; names that begin with a dot are tools', and skipped."""
    if not path.is_dir():
        return [path]
    paths: list[Path] = []
    for folder, folders, names in os.walk(path, followlinks=True):  # a hub's cache is made of links
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(paths)


def _of_file(path: Path) -> str:
    about = path.stat()
    return _digest(path, about.st_size, about.st_mtime_ns, about.st_ino)


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, *_: int) -> str:
    """The sha256 of a file's content, read once for a handler and all workflows that run it."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
