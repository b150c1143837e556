"""An answer on its way to a client, in the form of its protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http import HTTPStatus
from typing import Any

from torchserve_dag.direct import grpc
from torchserve_dag.runtime.worker.protocol import ServiceResponse

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Writer(ABC):
    """Writes an answer to a client in the form of its protocol."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self.request_id = send, request_id

    @abstractmethod
    async def whole(self, response: ServiceResponse) -> None:
        """Send all of an answer, or a failure."""

    async def message(self, message: bytes) -> None:
        """Send a message of a call as it is."""
        body = grpc.framed(message)
        await self._start(200, {"content-type": grpc.CONTENT_TYPE, "content-length": str(len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def begin(self, content_type: str) -> None:
        """Begin an answer in chunks."""
        await self._start(200, {"content-type": content_type})

    async def chunk(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, response: ServiceResponse) -> None:
        """Send the rest of an answer, which is often empty, or its failure."""
        await self._send({"type": "http.response.body", "body": response.body})

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        written = [
            (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items() if value
        ]
        written.append((b"x-request-id", self.request_id.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": written})


class RestWriter(Writer):
    async def whole(self, response: ServiceResponse) -> None:
        headers = {"content-type": response.content_type, "content-length": str(len(response.body))}
        await self._start(response.status, headers | dict(response.headers))
        await self._send({"type": "http.response.body", "body": response.body})


class GrpcWriter(Writer):
    async def whole(self, response: ServiceResponse) -> None:
        if response.status < HTTPStatus.BAD_REQUEST:
            body, headers = grpc.answer(response.body), dict(response.headers)
        else:
            body, headers = b"", grpc.failure_headers(response)
        about = {"content-type": grpc.CONTENT_TYPE, "content-length": str(len(body))}
        await self._start(response.status, headers | about)
        await self._send({"type": "http.response.body", "body": body})

    async def begin(self, content_type: str) -> None:  # noqa: ARG002 (each chunk is a message)
        await self._start(200, {"content-type": grpc.CONTENT_TYPE, grpc.TRAILERS_IN_BODY: "1"})

    async def chunk(self, body: bytes) -> None:
        await super().chunk(grpc.answer(body))

    async def end(self, response: ServiceResponse) -> None:
        if response.status >= HTTPStatus.BAD_REQUEST:
            last = grpc.trailers(response)
        else:
            last = grpc.answer(response.body) if response.body else b""
        await self._send({"type": "http.response.body", "body": last})
