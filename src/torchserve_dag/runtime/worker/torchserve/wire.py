"""TorchServe's socket to a worker: requests and answers, out of bytes and into them.

The form is that of TorchServe's own `ts/protocol/otf_message_handler.py` (0.12.0, its last release).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

NEXT = "ts_stream_next"
"""The header that tells TorchServe whether more of an answer will come: `true` or `false`."""

CHUNK = 1 << 18
"""Bytes that are read at a time."""

_INT = struct.Struct("!i")
_END = -1


class NotAllThereError(Exception):
    """The bytes end before the message does, which has at least `needed`."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class ProtocolError(Exception):
    """The bytes are not what TorchServe sends."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, as TorchServe's own service hands it to a handler."""

    id: str
    row: dict[str, bytes]
    headers: dict[str, Any]
    """The request's, and under each part's name its content type."""


@dataclass(frozen=True, slots=True)
class Told:
    """One request's answer, or a piece of it."""

    id: str
    status: int = 200
    phrase: str = ""
    content_type: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


def read_requests(data: bytearray) -> tuple[list[Asked], int]:
    """The first message of `data`, and where it ends. Raises NotAllThereError, ProtocolError."""
    if data[:1] != b"I":
        if not data:
            raise NotAllThereError(1)
        raise ProtocolError(f"a message begins with {bytes(data[:1])!r}")
    reader, asked = _Reader(data, 1), []
    places: list[dict[str, tuple[int, int]]] = []  # bodies may be large: none is copied before all are there
    while (size := reader.size()) != _END:
        name = reader.text(size)
        headers: dict[str, Any] = {}
        while (size := reader.size()) != _END:
            key = reader.text(size)
            headers[key] = reader.text(reader.size())
        types: dict[str, Any] = {}
        place = {}
        while (size := reader.size()) != _END:
            key = reader.text(size)
            types[key] = {"content-type": reader.text(reader.size())}
            place[key] = (reader.skip(reader.size()), reader.at)
        places.append(place)
        asked.append(Asked(name, {}, types | headers))
    with memoryview(data) as view:
        for one, place in zip(asked, places, strict=True):
            one.row.update((key, bytes(view[start:end])) for key, (start, end) in place.items())
    return asked, reader.at


def write_answers(told: Sequence[Told], code: int = 200, message: str = "") -> bytes:
    """One message with these answers. A `code` other than 200 would fail every request of the worker."""
    parts = [_INT.pack(code), *_text(message)]
    for one in told:
        parts += [*_text(one.id), *_text(one.content_type), _INT.pack(one.status), *_text(one.phrase)]
        parts.append(_INT.pack(len(one.headers)))
        for name, value in one.headers.items():
            parts += [*_text(name), *_text(value)]
        parts += [_INT.pack(len(one.body)), one.body]
    return b"".join([*parts, _INT.pack(_END)])


@dataclass(frozen=True, slots=True)
class Answers:
    """A message of answers: of each, what has to be known to pass it on."""

    code: int
    message: str
    more: list[tuple[str, bool]]
    """Each answer's request, and whether more of it will come."""


def read_answers(data: bytearray) -> tuple[Answers, int]:
    """The first message of `data`, and where it ends. Raises NotAllThereError."""
    reader = _Reader(data, 0)
    code, message = reader.size(), reader.text(reader.size())
    more = []
    while (size := reader.size()) != _END:
        name = reader.text(size)
        reader.skip(reader.size())
        reader.size()
        reader.skip(reader.size())
        headers = {}
        for _ in range(reader.size()):
            key = reader.text(reader.size())
            headers[key] = reader.text(reader.size())
        reader.skip(reader.size())
        more.append((name, headers.get(NEXT) != "false"))
    return Answers(code, message, more), reader.at


M = TypeVar("M")


class Messages(Generic[M]):
    """Cuts a stream into its messages."""

    def __init__(self, read: Callable[[bytearray], tuple[M, int]]) -> None:
        self._read = read
        self._data = bytearray()
        self._needed = 0

    def of(self, data: bytes) -> Iterator[tuple[M, bytes]]:
        """The messages that `data` completes, each with its bytes."""
        self._data += data
        while len(self._data) >= self._needed:
            try:
                message, end = self._read(self._data)
            except NotAllThereError as error:
                self._needed = error.needed
                return
            self._needed = 0
            whole = bytes(self._data[:end])
            del self._data[:end]
            yield message, whole


class _Reader:
    """Walks through a message."""

    def __init__(self, data: bytearray, at: int) -> None:
        self._data = data
        self.at = at

    def size(self) -> int:
        if self.at + 4 > len(self._data):
            raise NotAllThereError(self.at + 4)
        (value,) = _INT.unpack_from(self._data, self.at)
        self.at += 4
        return int(value)

    def skip(self, size: int) -> int:
        """Past `size` bytes; where they begin."""
        start = self.at
        if size < 0:
            raise ProtocolError(f"a part has {size} bytes")
        if start + size > len(self._data):
            raise NotAllThereError(start + size)
        self.at += size
        return start

    def text(self, size: int) -> str:
        start = self.skip(size)
        return self._data[start : self.at].decode("utf-8", "replace")


def _text(text: str) -> tuple[bytes, bytes]:
    encoded = text.encode()
    return _INT.pack(len(encoded)), encoded
