"""Archives of others, read with bounds: a small file may claim to hold more than the machine has.

Every function raises OSError, or zipfile.BadZipFile for whatever is wrong in an archive.
"""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_FILE = 16 * 2**20
"""In bytes: the most that a manifest, a settings file, or a Python file in an archive may have."""
MAX_RATIO, MAX_MORE = 100, 64 * 2**20
"""An archive may unpack to so many times its size, and so many bytes more. Text deflates to a tenth at best, weights
hardly at all."""


def check(path: Path) -> None:
    """Raises zipfile.BadZipFile for an archive that unpacks to much more than its size, or that is no archive."""
    with _opened(path) as packed:
        _check(packed, path)


def entries(path: Path) -> list[zipfile.ZipInfo]:
    """What an archive's directory says of each file in it."""
    with _opened(path) as packed:
        return packed.infolist()


def read(path: Path, name: str) -> bytes:
    """A small file in an archive. Raises KeyError if it is missing, zipfile.BadZipFile if it is over MAX_FILE."""
    with _opened(path) as packed:
        size = packed.getinfo(name).file_size
        if size > MAX_FILE:
            raise zipfile.BadZipFile(f"{name} in it has {size:,} bytes, and at most {MAX_FILE:,} are read")
        return packed.read(name)


def extract(path: Path, folder: Path, names: Collection[str] | None = None) -> None:
    """Unpack an archive, or the files of these names, into `folder`; no file leaves it. Raises zipfile.BadZipFile."""
    with _opened(path) as packed:
        _check(packed, path)
        packed.extractall(folder, names)


def inside(folder: Path, name: str) -> Path:
    """The file that a manifest names. Raises ValueError if it lies outside the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f'its manifest names "{name}", which lies outside it')
    return path


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Damaged or encrypted bytes, and unknown compressions, make zipfile raise zlib.error, RuntimeError and more."""
    try:
        with zipfile.ZipFile(path) as packed:
            yield packed
    except (OSError, KeyError, MemoryError, zipfile.BadZipFile):
        raise
    except Exception as error:  # noqa: BLE001
        raise zipfile.BadZipFile(str(error)) from None


def _check(packed: zipfile.ZipFile, path: Path) -> None:
    size, whole = path.stat().st_size, sum(entry.file_size for entry in packed.infolist())
    if whole > MAX_RATIO * size + MAX_MORE:
        raise zipfile.BadZipFile(f"it would unpack to {whole:,} bytes, from {size:,}")
