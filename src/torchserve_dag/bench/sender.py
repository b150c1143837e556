"""What a load needs of a protocol: send a body, and say how it ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

TOO_LATE = "time limit"
LOST = "connection lost"
UNREACHABLE = "cannot connect"

REFUSED = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}
"""How a server says that it has too much to do."""


class Answer(NamedTuple):
    """How a request ended: with a status and content, or for a reason that no server gave."""

    status: int
    """HTTP's, over gRPC too; 0 where no answer came."""
    content: bytes = b""
    """The answer, or what was said instead of one."""
    reason: str = ""
    """Why no answer came, or gRPC's own name of its status."""

    @property
    def ok(self) -> bool:
        return self.status == HTTPStatus.OK


Done = Callable[[Answer], None]


class Sender(ABC):
    """The connections to one server. It belongs to the event loop that runs when it is made."""

    @abstractmethod
    def send(self, body: int, done: Done) -> None:
        """Send the body with this number; `done` is called once, later, from the event loop."""

    @abstractmethod
    async def close(self) -> None:
        """Give the connections back; what is outstanding is dropped."""
