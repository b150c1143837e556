"""What an archive is, which archives a folder has, and the copies of archives that a server serves from."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.archives import atomic, mar
from torchserve_dag.runtime.data import unzip

ModelVersion = tuple[str, str]
"""A model, and one of its versions."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\Z")
"""Names of models that every part can carry: paths, headers, logs, files. model-archiver allows the same letters."""
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}\Z")
"""Versions that every part can carry. `?` and `!` are suffixes in the front door's names of clusters."""


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive, as its manifest names it."""

    path: Path
    name: str
    version: str
    hash: str
    """A short hash of its content: `mar.content_hash`."""


class UnusableArchiveError(Exception):
    """Why a file cannot be served as an archive: the end of a sentence that begins with its name."""


@dataclass(frozen=True, slots=True)
class Store:
    """What is in a folder of archives."""

    archives: Mapping[ModelVersion, tuple[Archive, ...]]
    """Archives by what they are; more than one of a version if files of different content are the same version."""
    unusable: Mapping[str, str]
    """File → why it cannot be served."""

    def only(self, names: Collection[str]) -> Store:
        """The store with only these files, of which some may not be there."""
        archives = {
            key: kept
            for key, found in self.archives.items()
            if (kept := tuple(one for one in found if one.path.name in names))
        }
        known = {one.path.name for found in self.archives.values() for one in found} | self.unusable.keys()
        missing = dict.fromkeys({*names} - known, "is in load_models of config.properties, and not in the store")
        return Store(archives, {name: why for name, why in self.unusable.items() if name in names} | missing)


def read_store(folder: Path) -> Store:
    """Read what the archives in a folder are. Hidden files are skipped."""
    archives: dict[ModelVersion, tuple[Archive, ...]] = {}
    unusable: dict[str, str] = {}
    for path in sorted(folder.glob("[!.]*")):
        unpacked = path.is_dir() and (path.suffix == ".mar" or (path / mar.MANIFEST).exists())
        if unpacked or path.name.endswith((".tar.gz", ".tgz")):
            unusable[path.name] = "is not a .mar file: pack it with model-archiver's default --archive-format"
        if path.is_dir() or path.suffix != ".mar":
            continue
        try:
            archive = read_archive(path)
        except UnusableArchiveError as error:
            unusable[path.name] = str(error)
            continue
        others = archives.get((archive.name, archive.version), ())
        if archive.hash not in {other.hash for other in others}:
            archives[archive.name, archive.version] = (*others, archive)
    return Store(archives, unusable)


def read_archive(path: Path) -> Archive:
    """What an archive is. Raises UnusableArchiveError."""
    try:
        unzip.check(path)
        name, version = mar.name_and_version(path)
        content = mar.content_hash(path)
    except OSError as error:
        raise UnusableArchiveError(f"cannot be read: {error.strerror or error}") from None
    except mar.BadArchiveError as error:
        raise UnusableArchiveError(f"is not an archive ({error}): delete it, or build it again") from None
    except (ValueError, LookupError, TypeError, AttributeError):  # its manifest says other things than a manifest does
        raise UnusableArchiveError("is not an archive: delete it, or build it again") from None
    if not NAME.match(name):
        what = f'is of a model "{name}": a name has letters of ASCII, digits, and _ . - after the first'
        raise UnusableArchiveError(f"{what}; archive it under another --model-name")
    if not VERSION.match(version):
        what = f'is of a version "{version}": a version has letters of ASCII, digits, and _ . + - after the first'
        raise UnusableArchiveError(f"{what}; archive it under another --version")
    return Archive(path, name, version, content)


def copy(archive: Archive, folder: Path) -> Archive:
    """The copy of an archive in `folder`, made if it is not there: what is served from it does not change any more.

    A real copy, for people write over files in place; the file system may share the blocks. Raises
    UnusableArchiveError.
    """
    target = folder / f"{archive.name}-{archive.version}.{archive.hash}.mar"
    copied = Archive(target, archive.name, archive.version, archive.hash)
    try:
        if _is(target, copied):
            return copied
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic.part_of(target) as part:
            _copy_bytes(archive.path, part)
            if read_archive(part).hash != archive.hash:
                raise UnusableArchiveError("changed while it was copied: start again when it is complete")
            part.replace(target)
    except OSError as error:
        raise UnusableArchiveError(f"cannot be copied to {folder}: {error.strerror or error}") from None
    return copied


def copies(folder: Path) -> dict[ModelVersion, Archive]:
    """The copies in a folder; the latest of each version."""
    found: dict[ModelVersion, Archive] = {}
    for path in sorted(folder.glob("[!.]*.mar"), key=lambda path: path.stat().st_mtime_ns):
        try:
            archive = read_archive(path)
        except UnusableArchiveError:
            continue
        found[archive.name, archive.version] = archive
    return found


def _is(path: Path, archive: Archive) -> bool:
    try:
        return read_archive(path) == archive
    except UnusableArchiveError:  # there is none, or it is damaged
        return False


_NO_RANGES = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
"""What copy_file_range says where a file system or a container does not have it."""


def _copy_bytes(source: Path, target: Path) -> None:
    with (
        source.open("rb", buffering=0) as read,
        open(target, "wb", buffering=0, opener=atomic.private) as written,
    ):
        try:
            while os.copy_file_range(read.fileno(), written.fileno(), 1 << 30):
                pass
        except OSError as error:
            if error.errno not in _NO_RANGES:
                raise
            shutil.copyfileobj(read, written, 1 << 20)  # from where the ranges ended
