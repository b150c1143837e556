"""What the forms of answers have in common: chats, completions and responses are written from the same chunks."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torchserve_dag.gateway.errors import ApiError
from torchserve_dag.runtime.messages import FinishReason, FunctionCall, TextChunk, TokenLogprob, ToolCall, Usage

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


@dataclass(slots=True)
class Choice:
    """One of the answers to a request, put together from its chunks."""

    text: str = ""
    finish_reason: FinishReason = "stop"
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    served_by: str | None = None

    def tool_call(self, part: ToolCall) -> None:
        """Add a part of a call to the call of its index; without one, a call of its own."""
        for at, call in enumerate(self.tool_calls):
            if part.index is not None and call.index == part.index:
                name = call.function.name or part.function.name
                arguments = (call.function.arguments or "") + (part.function.arguments or "")
                whole = replace(call, id=call.id or part.id, function=FunctionCall(name, arguments))
                self.tool_calls[at] = whole
                return
        self.tool_calls.append(part)


def put_together(chunks: Sequence[TextChunk]) -> list[Choice]:
    """The answers, in the order of their indexes; one, which is empty, without any chunk."""
    found: dict[int, Choice] = {}
    texts: dict[int, list[str]] = {}
    for chunk in chunks:
        choice = found.setdefault(chunk.index, Choice())
        texts.setdefault(chunk.index, []).append(chunk.text)
        choice.finish_reason = chunk.finish_reason or choice.finish_reason
        choice.served_by = chunk.served_by or choice.served_by
        if chunk.logprobs is not None:
            choice.logprobs = [*(choice.logprobs or []), *chunk.logprobs]
        for part in chunk.tool_calls or ():
            choice.tool_call(part)
    for index, choice in found.items():
        choice.text = "".join(texts[index])
    return [found[index] for index in sorted(found)] or [Choice()]


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
