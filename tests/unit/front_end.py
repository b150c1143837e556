"""TorchServe's end of a worker's socket, as its front end in Java reads and writes it."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REST = {"explain": "False", "Host": "localhost"}
"""What TorchServe hands on of any request over REST; over gRPC it hands on no header at all."""
WAIT_S = 30


@dataclass(frozen=True)
class Part:
    """One answer as TorchServe's front end reads it (ModelResponseDecoder)."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def next(self) -> str | None:
        return self.headers.get("ts_stream_next")

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class FrontEnd:
    """TorchServe's end of a worker's socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(WAIT_S)
        self._connection = connection
        self._file = connection.makefile("rb")
        self._parts: dict[str, list[Part]] = {}

    def ask(self, request_id: str, body: bytes = b"", headers: dict[str, str] = REST, **parts: bytes) -> None:
        self._connection.sendall(request(request_id, {"body": body, **parts}, headers))

    def ask_together(self, bodies: dict[str, bytes]) -> None:
        """One batch of requests over REST."""
        requests = [request(name, {"body": body}, REST)[1:-4] for name, body in bodies.items()]
        self._connection.sendall(b"I" + b"".join(requests) + struct.pack("!i", -1))

    def part(self, request_id: str) -> Part:
        """The next that comes for a request; what comes for others meanwhile is kept."""
        while not self._parts.get(request_id):
            for name, part in self._message():
                self._parts.setdefault(name, []).append(part)
        return self._parts[request_id].pop(0)

    def answer(self, request_id: str) -> Part:
        """A whole answer: over REST it ends with an empty part."""
        part = self.part(request_id)
        if part.next != "false":
            end = self.part(request_id)
            assert (end.next, end.body) == ("false", b"")
        return part

    def settle(self) -> None:
        """Returns when all requests are inside: the worker reads them one after another."""
        self.ask("settle", b"", {**REST, "x-cancel": "nobody's"})
        assert self.answer("settle").json == {"cancelled": False}

    def close(self) -> None:
        self._file.close()
        self._connection.close()

    def _message(self) -> list[tuple[str, Part]]:
        code, _ = self._int(), self._bytes()
        assert code == 200, "any other would fail every request of the worker"
        parts = []
        while (size := self._int()) != -1:
            name, _ = self._file.read(size).decode(), self._bytes()
            status, _ = self._int(), self._bytes()
            headers = {self._bytes().decode(): self._bytes().decode() for _ in range(self._int())}
            parts.append((name, Part(status, headers, self._bytes())))
        assert parts, "a message without answers ends the loading of a model"
        return parts

    def _int(self) -> int:
        return int(struct.unpack("!i", self._file.read(4))[0])

    def _bytes(self) -> bytes:
        return self._file.read(self._int())


def request(request_id: str, row: dict[str, bytes], headers: dict[str, str]) -> bytes:
    """As TorchServe's front end writes it (ModelRequestEncoder)."""
    return request_of_parts(request_id, [(name, "", value) for name, value in row.items()], headers)


def request_of_parts(request_id: str, parts: Sequence[tuple[str, str, bytes]], headers: dict[str, str]) -> bytes:
    """A request with parts, each with its name and content type: those of a form may share a name."""

    def sized(data: bytes) -> bytes:
        return struct.pack("!i", len(data)) + data

    end = struct.pack("!i", -1)
    named = b"".join(sized(k.encode()) + sized(v.encode()) for k, v in headers.items())
    row = b"".join(sized(k.encode()) + sized(media.encode()) + sized(value) for k, media, value in parts)
    return b"I" + sized(request_id.encode()) + named + end + row + end + end
