"""A language model's answer as a whole, put together from its chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torchserve_dag.runtime.messages import FinishReason, FunctionCall, TextChunk, TokenLogprob, ToolCall, Usage


@dataclass(slots=True)
class Choice:
    """One of the answers to a request, put together from its chunks."""

    text: str = ""
    finish_reason: FinishReason = "stop"
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    served_by: str | None = None
    usage: Usage | None = None
    """What all answers together have cost, if this one ended last."""

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
        choice.usage = chunk.usage or choice.usage
        if chunk.logprobs is not None:
            choice.logprobs = [*(choice.logprobs or []), *chunk.logprobs]
        for part in chunk.tool_calls or ():
            choice.tool_call(part)
    for index, choice in found.items():
        choice.text = "".join(texts[index])
    return [found[index] for index in sorted(found)] or [Choice()]
