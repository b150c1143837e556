"""Weights that an archive holds by reference: fetched once into a cache of the machine, verified, and linked.

The cache is `$TORCHSERVE_DAG_CACHE/weights/SHA256/`, by default in `~/.cache/torchserve-dag`. All versions, processes
and projects share it. What is there was verified, and does not change; a folder that is not used may be deleted.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from torchserve_dag.runtime.data.source import CheckError, Source
from torchserve_dag.runtime.project.folders import Project, is_below
from torchserve_dag.runtime.project.handler_file import HandlerFile
from torchserve_dag.runtime.project.weight_files import files, sha256
from torchserve_dag.runtime.project.weight_sources import WeightsSource, source_of

logger = logging.getLogger(__name__)

CACHE = "TORCHSERVE_DAG_CACHE"
"""The environment variable with the folder of the cache."""
WAIT_S = 3600.0
"""How long a process waits for another that fetches the same weights."""
SAY_S = 10.0
"""How often the log says how far a fetch is."""
CHUNK = 1 << 20


class FetchError(Exception):
    """Why weights cannot be fetched: a sentence without its full stop."""


def link_weights(project: Project, file: Source[HandlerFile]) -> None:
    """Put the weights that a handler's card names by reference below `weights/`, where the handler reads them.

    Weights that are there already stay. Raises CheckError.
    """
    for i, weights in enumerate(file.value.card.weights):
        path = project.weights / weights.file
        if not weights.fetch_from or not is_below(weights.file) or path.exists():
            continue
        try:
            _link(path, fetched(weights.fetch_from, weights.sha256 or "", path.name))
        except (FetchError, OSError) as error:
            what = f"{weights.file} cannot be fetched from {weights.fetch_from}: {_reason(error)}"
            raise CheckError([file.problem(("card", "weights", i, "fetch_from"), what)]) from None


def fetched(address: str, digest: str, name: str) -> Path:
    """The file or folder with this SHA-256 in the cache, fetched if it is not there; `name` is what it is called then.

    Raises FetchError, and OSError where the cache cannot be written.
    """
    if not digest:
        raise FetchError("the card has no sha256 to verify it with")
    folder = cache() / digest
    if found := _content(folder):
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{digest}.lock")):
        if found := _content(folder):  # by now
            return found
        part = folder.with_name(f"{digest}.part")
        _fetch(address, digest, part)
        folder.mkdir(exist_ok=True)
        return part.replace(folder / name)


def cache() -> Path:
    """The folder of the weights. Raises FetchError."""
    try:
        named = os.environ.get(CACHE)
        return (Path(named).expanduser() if named else Path.home() / ".cache" / "torchserve-dag").absolute() / "weights"
    except RuntimeError:
        raise FetchError(f"there is no home folder for a cache: set {CACHE}") from None


def _content(folder: Path) -> Path | None:
    """What a folder of the cache holds; it was moved there whole."""
    with suppress(OSError):
        return next(folder.iterdir(), None)
    return None


def _fetch(address: str, digest: str, part: Path) -> None:
    """Fetch into `part`, going on where an earlier attempt ended, until the SHA-256 is right. Raises FetchError."""
    began, resumes = time.monotonic(), part.exists()
    logger.info("fetching %s from %s", "the rest of the weights" if resumes else "weights", address)
    try:
        _copy(source_of(address), part)
        found = sha256(part)
    except Exception as error:  # noqa: BLE001 (each store's package has its own)
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        raise FetchError(f"the disk of {part.parent} is full" if full else _reason(error)) from None
    if found == digest:
        for file in files(part):
            file.chmod(0o444)  # no handler may change what others read
        logger.info("fetched weights from %s in %.1f s", address, time.monotonic() - began)
        return
    _delete(part)
    if not resumes:
        raise FetchError(f"its sha256 is {found}, and the card says {digest}")
    _fetch(address, digest, part)  # the part may have been of another content than is there now


def _copy(source: WeightsSource, part: Path) -> None:
    """Copy what `part` lacks: a file, or a folder of files. Raises OSError, ValueError, and what the source raises."""
    names = source.names()
    if part.exists() and part.is_file() != (names == [""]):
        _delete(part)
    for name in names:
        if name and not is_below(name):
            raise ValueError(f'it holds "{name}", which would lie outside the cache')
        path = part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _copy_file(source, name, path)


def _copy_file(source: WeightsSource, name: str, path: Path) -> None:
    there = path.stat().st_size if path.exists() else 0
    opened = source.open(name, there)
    if opened.size is not None and opened.size < there:
        opened.stream.close()
        opened = source.open(name, 0)
    done, said = opened.start, time.monotonic()
    with closing(opened.stream), path.open("ab") as file:
        file.truncate(done)
        while chunk := opened.stream.read(CHUNK):
            file.write(chunk)
            done += len(chunk)
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                whole = f" of {opened.size / 1e9:.2f}" if opened.size else ""
                logger.info("%s: %.2f%s GB are fetched", path.name, done / 1e9, whole)
        file.flush()
        os.fsync(file.fileno())  # what is verified must outlive a power cut
    if opened.size is not None and done != opened.size:
        raise OSError(f"it ended after {done:,} of {opened.size:,} bytes; the next attempt goes on from there")


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _link(path: Path, target: Path) -> None:
    """Make `path` a symbolic link, in one step: several workers may share the folder of an archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    link = path.with_name(f".{path.name}.{secrets.token_hex(4)}.link")
    link.symlink_to(target)
    link.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process. Raises FetchError where another has held it for too long."""
    deadline = time.monotonic() + WAIT_S
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise FetchError(f"another process has been fetching it for {WAIT_S / 60:.0f} minutes") from None
                time.sleep(0.1)
        yield


def _reason(error: Exception) -> str:
    """What an exception says, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, FileNotFoundError):  # a store's says only the file's name
        return "there is no such file"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
