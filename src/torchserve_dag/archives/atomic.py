"""Files written whole or not at all: a reader sees the old content or the new, never a part of either."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def write_reserved(path: Path, text: str) -> None:
    """Like `write_private`, and keeps space for the next write: one that is no longer succeeds on a full disk too."""
    spare = path.with_name(f".{path.name}.spare")
    try:
        write_private(path, text)
    except OSError as error:
        try:  # the spare's blocks are allocated: overwriting them needs no others
            with spare.open("r+b") as file:
                file.write(text.encode())
                file.truncate()
            spare.replace(path)
        except OSError:
            raise error from None
    with suppress(OSError):
        descriptor = os.open(spare, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, max(1, len(text.encode())))
        finally:
            os.close(descriptor)


def private(path: str, flags: int) -> int:
    """An opener for `open`: a file that is made is its owner's only."""
    return os.open(path, flags, 0o600)


@contextmanager
def part_of(path: Path) -> Iterator[Path]:
    """A hidden file beside `path`, to be written first and then moved there; it is deleted if it was not moved.

    Hidden, because TorchServe loads every other file in a model store. An OSError of the block names `path`.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")  # each writer has a file of its own
    try:
        yield part
    except OSError as error:
        if error.filename is None or str(error.filename) == str(part):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        part.unlink(missing_ok=True)
