"""Where weights are fetched from: a file or folder of this machine, an HTTP server, or whatever fsspec reads."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from torchserve_dag.runtime.project.weight_files import files

TIMEOUT_S = 60.0
"""How long an HTTP server may send nothing."""


class OpenedWeights(NamedTuple):
    """A file of weights that is being read."""

    stream: BinaryIO
    start: int
    """The byte at which the stream begins: 0 where the source cannot begin in the middle."""
    size: int | None
    """The bytes of the whole file; None if the source does not say."""


class WeightsSource(Protocol):
    """Weights to fetch: a file, or a folder of files. The methods raise OSError, and what a store's package raises."""

    def names(self) -> list[str]:
        """The paths of a folder's files inside it; `[""]` for a single file."""

    def open(self, name: str, start: int) -> OpenedWeights:
        """Read a file, from byte `start` on if the source can do that."""


def source_of(address: str) -> WeightsSource:
    """The source that an address means. Raises ImportError, ValueError for one that cannot be read here."""
    if path := local_path(address):
        return LocalWeights(path)
    return HttpWeights(address) if urlsplit(address).scheme in {"http", "https"} else FsspecWeights(address)


def local_path(address: str) -> Path | None:
    """The path of this machine that an address means, if it means one."""
    if "://" not in address:
        return Path(address)
    url = urlsplit(address)
    return Path(unquote(url.path)) if url.scheme == "file" and url.netloc in {"", "localhost"} else None


@dataclass(frozen=True, slots=True)
class LocalWeights:
    path: Path

    def names(self) -> list[str]:
        return [file.relative_to(self.path).as_posix() for file in files(self.path)] if self.path.is_dir() else [""]

    def open(self, name: str, start: int) -> OpenedWeights:
        path = self.path / name
        stream = path.open("rb")
        stream.seek(start)
        return OpenedWeights(stream, start, path.stat().st_size)


@dataclass(frozen=True, slots=True)
class HttpWeights:
    """A file of an HTTP server. It needs no package, where fsspec's own HTTP needs two."""

    url: str

    def names(self) -> list[str]:
        return [""]

    def open(self, name: str, start: int) -> OpenedWeights:
        request = Request(self.url, headers={"Range": f"bytes={start}-"} if start else {})  # noqa: S310 (http, https)
        try:
            response = urlopen(request, timeout=TIMEOUT_S)  # noqa: S310
        except HTTPError as error:
            if not start or error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            return self.open(name, 0)
        begins = start if response.status == HTTPStatus.PARTIAL_CONTENT else 0
        length = response.headers.get("Content-Length")
        return OpenedWeights(response, begins, begins + int(length) if length else None)


class FsspecWeights:
    """A file or folder of a store: `s3://`, `gs://`, `hf://`, …"""

    def __init__(self, address: str) -> None:
        import fsspec  # noqa: PLC0415 (only archives with such an address need it)

        self._files: Any
        self._files, self._path = fsspec.url_to_fs(address)

    def names(self) -> list[str]:
        if not self._files.isdir(self._path):
            return [""]
        inside = f"{self._path.rstrip('/')}/"
        names = [str(path).removeprefix(inside) for path in self._files.find(self._path)]
        return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]

    def open(self, name: str, start: int) -> OpenedWeights:
        path = f"{self._path.rstrip('/')}/{name}" if name else self._path
        size = self._files.size(path)
        stream = self._files.open(path, "rb")
        if start:
            with suppress(ValueError, OSError):  # a stream that cannot begin in the middle
                stream.seek(start)
                return OpenedWeights(stream, start, size)
        return OpenedWeights(stream, 0, size)
