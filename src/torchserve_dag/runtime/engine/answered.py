"""A request's message with what answered it, for those who keep both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torchserve_dag.runtime.engine.gather import PENDING
from torchserve_dag.runtime.engine.request import Request


@dataclass(frozen=True, slots=True)
class AnsweredRequest:
    request_id: str
    message: Any
    """The decoded message."""
    chunks: Sequence[Any]
    """The chunks that the client got, if it got some."""
    answer: Any
    """The answer, a list of all chunks where they left together, or a Failure; an empty list after `chunks`."""


Keep = Callable[[AnsweredRequest], None]
"""Gets each request that has ended and whose message could be read. It must not block."""


def hand_over(keep: Keep, request: Request, future: Future[Any]) -> None:
    """Give an ended request to whoever keeps it, unless its message was never read."""
    message, request.message = request.message, PENDING  # a caller may keep the request, but not its images
    chunks = request.stream.take_kept() if request.stream else ()
    if message is not PENDING and not future.cancelled():
        keep(AnsweredRequest(request.id, message, chunks, future.result()))
