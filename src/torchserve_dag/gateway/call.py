"""One HTTP call to a model, over Envoy's socket for the gateway.

Each call has a connection of its own, which costs 0.1 ms: to close it is to cancel the call. Not httpx: that reads
HTTP in Python, which costs more for each token than the rest of the gateway.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path

import httptools

from torchserve_dag.gateway.errors import ApiError

READ_BYTES = 2**16
"""How much of an answer is read ahead of its client; Envoy waits with the rest."""
_AGAIN = {"retry-after": "1"}


class BrokenAnswerError(ApiError):
    """The connection broke in the middle of an answer."""

    def __init__(self) -> None:
        message = "The model's answer broke off: its worker has ended, or took too long."
        super().__init__(HTTPStatus.BAD_GATEWAY, message, code="broken_answer")


class ModelAnswer:
    """An answer that is being read."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        """With names in lower case."""
        self._reader, self._parser = reader, httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._begun = self._ended = False

    async def begin(self) -> None:
        """Read its status and headers. Raises BrokenAnswerError."""
        while not self._begun:
            await self._read()

    async def parts(self) -> AsyncIterator[bytes]:
        """Its body, as it comes. Raises BrokenAnswerError."""
        while True:
            if self._parts:
                part, self._parts = b"".join(self._parts), []
                yield part
            elif self._ended:
                return
            else:
                await self._read()

    async def whole(self) -> bytes:
        """Its whole body. Raises BrokenAnswerError."""
        return b"".join([part async for part in self.parts()])

    async def _read(self) -> None:
        """Read some more. How long that may take is the limit of Envoy's route to the model."""
        try:
            data = await self._reader.read(READ_BYTES)
            if not data:
                raise BrokenAnswerError
            self._parser.feed_data(data)
        except (OSError, httptools.HttpParserError):
            raise BrokenAnswerError from None

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._begun = True

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self._ended = True


class ModelsSocket:
    """Calls models through Envoy's socket, whose folder may have a path that is too long for one."""

    def __init__(self, socket: Path) -> None:
        self._folder = os.open(socket.parent, os.O_PATH)
        self._address = f"/proc/self/fd/{self._folder}/{socket.name}"

    @asynccontextmanager
    async def call(self, path: str, headers: Mapping[str, str], body: bytes) -> AsyncIterator[ModelAnswer]:
        """Post to a path; the answer, with its status and headers. Leaving the block closes the connection, which
        cancels what is not done. Raises ApiError.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(self._address, limit=READ_BYTES)
        except OSError:
            message = "The way to the models is closed for a moment; try again."
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message, headers=_AGAIN) from None
        try:
            lines = [f"POST {path} HTTP/1.1", "host: models", "connection: close", f"content-length: {len(body)}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
            answer = ModelAnswer(reader)
            await answer.begin()
            yield answer
        finally:
            writer.transport.abort()
