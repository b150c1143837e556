"""The documents of a folder: which files are read, and which are left out, with a sentence for each."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Kind = Literal["markdown", "text", "html", "pdf"]
KINDS: dict[str, Kind] = {
    ".md": "markdown",
    ".markdown": "markdown",
    ".txt": "text",
    ".rst": "text",
    ".html": "html",
    ".htm": "html",
    ".pdf": "pdf",
}
MAX_BYTES = 32_000_000
MAX_DOCUMENTS = 100_000


class IndexingError(Exception):
    """An index cannot be built or changed: a sentence, with what to do."""


class DocumentError(IndexingError):
    """A document cannot be indexed; the others can."""


@dataclass(frozen=True, slots=True)
class Document:
    """A file that is to be indexed."""

    name: str
    """Its path, from the folder around the documents' folder, with slashes."""
    path: Path
    kind: Kind
    sha256: str


@dataclass(slots=True)
class Found:
    """What a folder has."""

    documents: list[Document] = field(default_factory=list)
    """By name."""
    problems: list[str] = field(default_factory=list)
    """A sentence for each document that cannot be indexed."""
    others: Counter[str] = field(default_factory=Counter)
    """How many files of other kinds there are, by their suffixes."""


def find(folder: Path) -> Found:
    """The documents in and below a folder; without hidden files, and links that lead out of it.

    Raises IndexingError for a folder with too many.
    """
    found, top = Found(), folder.resolve()
    for path in _files(folder):
        kind = KINDS.get(path.suffix.lower())
        name = f"{top.name}/{path.relative_to(folder).as_posix()}"
        if kind is None:
            found.others[path.suffix.lower() or "no suffix"] += 1
            continue
        if len(found.documents) >= MAX_DOCUMENTS:
            raise IndexingError(f"{folder} has more than {MAX_DOCUMENTS:,} documents: index its folders one by one.")
        try:
            found.documents.append(Document(name, path, kind, _digest(path, name, top)))
        except DocumentError as error:
            found.problems.append(str(error))
        except OSError as error:
            found.problems.append(f"{name} cannot be read: {error.strerror or error}.")
    return found


def _files(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in sorted(names) if not name.startswith("."))


def _digest(path: Path, name: str, top: Path) -> str:
    """The SHA-256 of a file. Raises DocumentError for a file that is not to be read."""
    if not path.resolve().is_relative_to(top):
        raise DocumentError(f"{name} is a link that leads out of the folder: put the document itself there.")
    if not path.is_file():
        raise DocumentError(f"{name} is no file.")
    size = path.stat().st_size
    if size > MAX_BYTES:
        megabytes = f"{size / 1e6:,.0f} MB, and the limit is {MAX_BYTES / 1e6:.0f} MB"
        raise DocumentError(f"{name} has {megabytes}: split it into several documents.")
    return hashlib.sha256(path.read_bytes()).hexdigest()
