"""A request's message with what answered it, for those who keep both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


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
