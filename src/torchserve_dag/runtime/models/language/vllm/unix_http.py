"""HTTP over a Unix socket: one request a connection, whose answer is read as it comes."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

MOST_BYTES = 8 << 20
"""The longest answer, or chunk of one, that is read."""


@dataclass(frozen=True, slots=True)
class UnixAnswer:
    """An answer whose head has come."""

    status: int
    chunked: bool
    length: int | None
    """Bytes of its body, where it is not chunked; None for all until the connection's end."""
    _reader: asyncio.StreamReader

    async def parts(self) -> AsyncIterator[bytes]:
        """The body, as it comes. Raises EOFError if it is cut off, OSError."""
        if not self.chunked:
            yield await self._reader.readexactly(self.length) if self.length is not None else await self._reader.read()
            return
        while size := int((await _line(self._reader)).partition(b";")[0], 16):
            if size > MOST_BYTES:
                raise OSError(f"a chunk of {size:,} bytes")
            yield (await self._reader.readexactly(size + 2))[:-2]

    async def body(self) -> bytes:
        """The whole body. Raises EOFError, OSError."""
        return b"".join([part async for part in self.parts()])


@asynccontextmanager
async def post(path: Path, target: str, body: Any) -> AsyncIterator[UnixAnswer]:
    """Post JSON data to the server at the socket `path`. Leaving the context closes the connection, which cancels what
    the server still does for it. Raises OSError, and EOFError where the server closes the connection.
    """
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        head = f"POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        yield await _head(reader)
    finally:
        writer.close()


async def _head(reader: asyncio.StreamReader) -> UnixAnswer:
    status = int((await _line(reader)).split(b" ", 2)[1])
    chunked, length = False, None
    while line := await _line(reader):
        name, _, value = line.lower().partition(b":")
        if name == b"transfer-encoding":
            chunked = value.strip() == b"chunked"
        elif name == b"content-length":
            length = min(int(value), MOST_BYTES)
    return UnixAnswer(status, chunked, length, reader)


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return (await reader.readuntil(b"\r\n"))[:-2]
    except asyncio.LimitOverrunError:
        raise OSError("a line of more than 64 KiB") from None


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, within_s: float) -> None:
        super().__init__("localhost", timeout=within_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask(path: Path, target: str, body: Any = None, within_s: float = 10.0) -> tuple[int, bytes]:
    """The status and the body of a short answer; a POST if there is a body to send. Raises OSError."""
    connection = _Connection(path, within_s)
    try:
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", target, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read(MOST_BYTES)
    except http.client.HTTPException as error:
        raise OSError(f"no answer of HTTP ({type(error).__name__})") from error
    finally:
        connection.close()


def is_ready(path: Path) -> bool:
    """Whether the server at the socket answers `/health`."""
    try:
        return ask(path, "/health", within_s=5)[0] == HTTPStatus.OK
    except OSError:
        return False
