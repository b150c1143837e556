"""Files written whole or not at all: a reader sees the old content or the new, never a part of either."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file. An existing file keeps its permissions, and a symbolic link stays a link."""
    path = path.resolve()
    with part_of(path) as part:
        part.write_text(text, "utf-8")
        if path.exists():
            part.chmod(path.stat().st_mode)
        part.replace(path)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read. A missing folder is made so that only its owner may enter it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with part_of(path) as part:
        part.touch(mode=0o600)
        part.write_text(text, "utf-8")
        part.replace(path)


@contextmanager
def part_of(path: Path) -> Iterator[Path]:
    """A hidden file beside `path`, to be written first and then moved there; it is deleted if it was not moved.

    Hidden, because TorchServe loads every other file in a model store.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")  # each writer has a file of its own
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)
