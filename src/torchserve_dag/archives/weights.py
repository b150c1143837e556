"""Verifies weights against the hashes in their cards: weights without a hash are not packed."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from torchserve_dag.runtime.data.source import CheckError, Problem, Source
from torchserve_dag.runtime.project.folders import Project, is_below
from torchserve_dag.runtime.project.handler_file import HandlerFile


class MissingWeightsError(CheckError):
    """Weights that a card names are not on this machine; the handlers have no other problem."""


def verified(project: Project, handlers: Iterable[Source[HandlerFile]]) -> dict[str, str]:
    """The sha256 of every file or folder of weights that the handlers' cards name, by its name below `weights/`.

    Raises CheckError if weights differ from their card, or the card has no sha256; MissingWeightsError if the only
    problem is that weights are not on this machine.
    """
    missing: list[Problem] = []
    wrong: list[Problem] = []
    digests: dict[str, str] = {}
    for source in handlers:
        for i, weights in enumerate(source.value.card.weights):
            at = ("card", "weights", i)
            path = project.weights / weights.file
            if not is_below(weights.file):
                wrong.append(
                    source.problem((*at, "file"), f'"{weights.file}" is not below weights/', "write a path inside it")
                )
            elif not path.exists():
                get = f"get them with: {weights.get}" if weights.get else f"they come from {weights.source}"
                missing.append(source.problem((*at, "file"), f"there are no weights {path}", get))
            else:
                digest = digests.setdefault(weights.file, sha256(path))
                if weights.sha256 is None:
                    help_ = f"write sha256: {digest}, or let torchserve-dag build --update-cards write it"
                    wrong.append(source.problem(at, f"{weights.file}: the card has no sha256", help_))
                elif weights.sha256 != digest:
                    what = f"{weights.file}: its sha256 is {digest}, and the card says {weights.sha256}"
                    again = f"get them again with: {weights.get}" if weights.get else f"get them from {weights.source}"
                    help_ = f"{again}; or, if these are the right ones: torchserve-dag build --update-cards"
                    wrong.append(source.problem((*at, "sha256"), what, help_))
    if wrong:
        raise CheckError(wrong + missing)
    if missing:
        raise MissingWeightsError(missing)
    return digests


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
