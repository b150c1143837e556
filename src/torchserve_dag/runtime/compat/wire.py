"""What TorchServe and its workers send each other: requests and responses, read from bytes and written to bytes.

The process of an unedited handler is sent the same.

The form is that of TorchServe's own `ts/protocol/otf_message_handler.py` (0.12.0, its last release).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

NEXT = "ts_stream_next"
"""The header that tells TorchServe whether more chunks of a response will follow: `true` or `false`."""

READ_BYTES = 1 << 18
"""How many bytes are read from a socket at a time."""

_INT = struct.Struct("!i")
_END = -1


class NotAllThereError(Exception):
    """The message is incomplete: it has at least `needed` bytes."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class ProtocolError(Exception):
    """The bytes are not what TorchServe sends."""


@dataclass(frozen=True, slots=True)
class WireRequest:
    """A request, as TorchServe's own service hands it to a handler."""

    id: str
    row: dict[str, Any]
    """The request's body as `body`, or a form's parts by name: bytes from the socket."""
    headers: dict[str, Any]
    """The request's headers, and under each part's name a mapping with its content type."""
    repeated: tuple[str, ...] = ()
    """Names that several parts of a form have. The row has the last part of each name."""


@dataclass(frozen=True, slots=True)
class WireResponse:
    """A request's response, or a chunk of it."""

    id: str
    status: int = 200
    phrase: str = ""
    content_type: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


def read_requests(data: bytearray) -> tuple[list[WireRequest], int]:
    """The first message of `data`, and where it ends. Raises NotAllThereError, ProtocolError."""
    if data[:1] != b"I":
        if not data:
            raise NotAllThereError(1)
        raise ProtocolError(f"a message begins with {bytes(data[:1])!r}")
    reader, requests = _Cursor(data, 1), []
    places: list[
        dict[str, tuple[int, int]]
    ] = []  # bodies may be large: they are copied only when the message is complete
    while (size := reader.size()) != _END:
        name = reader.text(size)
        headers: dict[str, Any] = {}
        while (size := reader.size()) != _END:
            key = reader.text(size)
            headers[key] = reader.text(reader.size())
        types: dict[str, Any] = {}
        place: dict[str, tuple[int, int]] = {}
        repeated: list[str] = []
        while (size := reader.size()) != _END:
            key = reader.text(size)
            if key in place:
                repeated.append(key)
            types[key] = {"content-type": reader.text(reader.size())}
            place[key] = (reader.skip(reader.size()), reader.at)
        places.append(place)
        requests.append(WireRequest(name, {}, types | headers, tuple(repeated)))
    with memoryview(data) as view:
        for request, place in zip(requests, places, strict=True):
            request.row.update((key, bytes(view[start:end])) for key, (start, end) in place.items())
    return requests, reader.at


def write_requests(requests: Sequence[WireRequest]) -> bytes:
    """One message with these requests, as TorchServe sends it."""
    parts: list[bytes] = [b"I"]
    for request in requests:
        parts += _text(request.id)
        for name, value in request.headers.items():
            if isinstance(value, str):
                parts += [*_text(name), *_text(value)]
        parts.append(_INT.pack(_END))
        for key, body in request.row.items():
            about = request.headers.get(key)
            media = about.get("content-type", "") if isinstance(about, Mapping) else ""
            parts += [*_text(key), *_text(media), _INT.pack(len(body)), body]
        parts.append(_INT.pack(_END))
    return b"".join([*parts, _INT.pack(_END)])


def write_responses(responses: Sequence[WireResponse], code: int = 200, message: str = "") -> bytes:
    """One message with these responses. A `code` other than 200 makes TorchServe fail every request of the worker."""
    parts = [_INT.pack(code), *_text(message)]
    for response in responses:
        parts += [*_text(response.id), *_text(response.content_type)]
        parts += [_INT.pack(response.status), *_text(response.phrase), _INT.pack(len(response.headers))]
        for name, value in response.headers.items():
            parts += [*_text(name), *_text(value)]
        parts += [_INT.pack(len(response.body)), response.body]
    return b"".join([*parts, _INT.pack(_END)])


@dataclass(frozen=True, slots=True)
class ResponseHeads:
    """The parts of a message of responses that the guard needs to pass it on."""

    code: int
    message: str
    more: list[tuple[str, bool]]
    """For each response: its request's id, and whether more chunks will follow."""


def read_response_heads(data: bytearray) -> tuple[ResponseHeads, int]:
    """The heads of the first message of `data`, and where it ends. Raises NotAllThereError."""
    reader = _Cursor(data, 0)
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
    return ResponseHeads(code, message, more), reader.at


def read_responses(data: bytearray) -> tuple[int, str, list[WireResponse]]:
    """A whole message: its code, its text, and its responses, without their headers. Raises NotAllThereError."""
    reader = _Cursor(data, 0)
    code, message = reader.size(), reader.text(reader.size())
    responses = []
    while (size := reader.size()) != _END:
        name, media = reader.text(size), reader.text(reader.size())
        status, phrase = reader.size(), reader.text(reader.size())
        for _ in range(2 * reader.size()):
            reader.skip(reader.size())
        start = reader.skip(reader.size())
        responses.append(WireResponse(name, status, phrase, media, {}, bytes(data[start : reader.at])))
    return code, message, responses


M = TypeVar("M")


class WireReader(Generic[M]):
    """Splits a stream of bytes into messages."""

    def __init__(self, read: Callable[[bytearray], tuple[M, int]]) -> None:
        self._read = read
        self._data = bytearray()
        self._needed = 0

    def feed(self, data: bytes) -> Iterator[tuple[M, bytes]]:
        """The messages that `data` completes, each parsed and as bytes."""
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


class _Cursor:
    """A position in a message that is being read."""

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
        """Skip `size` bytes. Returns where they begin."""
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
