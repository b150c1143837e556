"""HTTP/1.1 answers, read from whatever pieces the network makes of them (RFC 9112)."""

from __future__ import annotations

from http import HTTPStatus
from typing import NamedTuple

_HEAD_END = b"\r\n\r\n"
_LINE_END = b"\r\n"
_NO_CONTENT = {HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED}


class HttpAnswer(NamedTuple):
    status: int
    content: bytes
    keep_alive: bool
    """Whether the connection may be used again."""


class AnswerReader:
    """The answers of one connection, to requests that are sent one at a time.

    It reads what servers of predictions send: a length, chunks, or everything until the connection closes.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._read_head = False
        self._status = 0
        self._keep_alive = True
        self._length: int | None = None
        """Of the content; None while it comes in chunks or until the connection closes."""
        self._chunks: list[bytes] | None = None
        self._at = 0
        """How much of the buffer is read."""

    @property
    def begun(self) -> bool:
        """Whether some of an answer has come."""
        return self._read_head or bool(self._buffer)

    def feed(self, data: bytes) -> HttpAnswer | None:
        """The answer, where this is its last piece. Raises ValueError for what is not HTTP."""
        self._buffer += data
        if not self._read_head and not self._head():
            return None
        if self._chunks is not None:
            return self._end(b"".join(self._chunks)) if self._last_chunk() else None
        if self._length is None or len(self._buffer) - self._at < self._length:
            return None
        return self._end(bytes(self._buffer[self._at : self._at + self._length]))

    def closed(self) -> HttpAnswer | None:
        """The answer that the end of the connection completes, if it does."""
        if self._read_head and self._length is None and self._chunks is None:
            return self._end(bytes(self._buffer[self._at :]))
        return None

    def _head(self) -> bool:
        end = self._buffer.find(_HEAD_END)
        if end < 0:
            return False
        head = bytes(self._buffer[: end + len(_LINE_END)]).lower()
        if not head.startswith(b"http/1."):
            raise ValueError("the answer is not HTTP/1.1")
        self._status = int(head[9:12])
        if self._status < HTTPStatus.OK:  # 100 Continue: the answer follows
            del self._buffer[: end + len(_HEAD_END)]
            return self._head()
        closes, old = _field(head, b"connection"), head.startswith(b"http/1.0")
        self._keep_alive = closes == b"keep-alive" if old else closes != b"close"
        length = _field(head, b"content-length")
        self._length = int(length) if length else None
        if self._status in _NO_CONTENT:
            self._length = 0
        elif b"chunked" in _field(head, b"transfer-encoding"):
            self._length, self._chunks = None, []
        self._at = end + len(_HEAD_END)
        self._read_head = True
        return True

    def _last_chunk(self) -> bool:
        """Take the chunks that are complete; whether the last one, which is empty, is among them."""
        chunks = self._chunks
        while chunks is not None:
            line_end = self._buffer.find(_LINE_END, self._at)
            if line_end < 0:
                break
            size = int(self._buffer[self._at : line_end].partition(b";")[0], 16)
            start = line_end + len(_LINE_END)
            if not size:  # lines of trailers may follow, and an empty one ends them
                return self._buffer.startswith(_LINE_END, start) or self._buffer.find(_HEAD_END, start) >= 0
            if len(self._buffer) < start + size + len(_LINE_END):
                break
            chunks.append(bytes(self._buffer[start : start + size]))
            self._at = start + size + len(_LINE_END)
        return False

    def _end(self, content: bytes) -> HttpAnswer:
        delimited = self._length is not None or self._chunks is not None
        self._buffer.clear()
        self._read_head, self._chunks = False, None
        return HttpAnswer(self._status, content, self._keep_alive and delimited)


def _field(head: bytes, name: bytes) -> bytes:
    """A header's value, of a head in small letters; empty where there is none."""
    start = head.find(b"\r\n" + name + b":")
    if start < 0:
        return b""
    start += len(name) + 3
    return head[start : head.index(_LINE_END, start)].strip()
