"""What the forms of answers have in common: chats, completions and responses are written from the same chunks."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torchserve_dag.gateway.errors import ApiError
from torchserve_dag.runtime.messages import TextChunk, Usage
from torchserve_dag.runtime.models.language.choice import Choice

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Head:
    """What every part of an answer repeats."""

    id: str
    """Of the request."""
    model: str
    created: int = field(default_factory=lambda: int(time.time()))


class Form(Protocol):
    """How one request's answer is written. An object of its own for each request, for it counts events."""

    def chunks(self, head: Head, chunks: Sequence[TextChunk]) -> bytes:
        """The events for chunks; before the first ones, those that a stream begins with."""

    def end(self, head: Head, usage: Usage) -> bytes:
        """The last events."""

    def failed(self, head: Head, error: ApiError) -> bytes:
        """The last event of a stream that breaks off."""

    def whole(self, head: Head, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """An answer that is no stream."""


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """A server-sent event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + b"data: " + text.encode() + b"\n\n"


def usage_fields(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
