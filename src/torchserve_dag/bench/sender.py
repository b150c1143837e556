"""The interface of a protocol to a load: send a body, and report how the request ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

TOO_LATE = "time limit"
LOST = "connection lost"
UNREACHABLE = "cannot connect"

REFUSED = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}
"""The statuses of a server that refuses requests because it is overloaded."""


class Answer(NamedTuple):
    """How a request ended: with a status and content, or without an answer for some reason."""

    status: int
    """The HTTP status, over gRPC too; 0 without an answer."""
    content: bytes = b""
    """The answer's body, or the error's text."""
    reason: str = ""
    """Why no answer came, or the name of gRPC's status."""

    @property
    def ok(self) -> bool:
        return self.status == HTTPStatus.OK


Done = Callable[[Answer], None]


class Sender(ABC):
    """The connections to one server. It belongs to the event loop that is running when it is made."""

    @abstractmethod
    def send(self, body: int, done: Done) -> None:
        """Send the body with this number; `done` is called once, later, from the event loop."""

    @abstractmethod
    async def close(self) -> None:
        """Close the connections; outstanding requests are dropped."""
