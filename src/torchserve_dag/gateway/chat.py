"""`/v1/chat/completions`: OpenAI's JSON as a Chat, and chunks of text as OpenAI's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchserve_dag.gateway import fields
from torchserve_dag.gateway.errors import ApiError
from torchserve_dag.gateway.form import DONE, Head, event, usage_fields
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.messages import Chat, TextChunk, TokenLogprob, ToolCall, Usage
from torchserve_dag.runtime.models.language.choice import Choice

NEUTRAL = {**fields.NEUTRAL, "modalities": (["text"],)}


def read(data: dict[str, Any]) -> Chat:
    """The chat of a request, of which `model`, `stream` and `stream_options` are taken out. Raises ApiError."""
    fields.drop_neutral(data, NEUTRAL)
    if isinstance(messages := data.get("messages"), list):
        data["messages"] = fields.without_nulls(messages)
    return fields.message_of(Chat, data)


class ChatForm:
    """An answer as a chat completion."""

    def __init__(self, *, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._open: dict[int, bool] = {}
        """Index of each answer that has begun → whether it is yet to end."""
        self._served_by: str | None = None

    def chunks(self, head: Head, chunks: Sequence[TextChunk]) -> bytes:
        events = []
        for chunk in chunks:
            delta: dict[str, Any] = {"content": chunk.text}
            if chunk.tool_calls:
                delta = {"tool_calls": [_part_of_call(at, call) for at, call in enumerate(chunk.tool_calls)]}
                delta |= {"content": chunk.text} if chunk.text else {}
            if chunk.index not in self._open:
                delta = {"role": "assistant", **delta}
            self._open[chunk.index] = chunk.finish_reason is None
            self._served_by = chunk.served_by or self._served_by
            logprobs = None if chunk.logprobs is None else {"content": _logprobs(chunk.logprobs), "refusal": None}
            choice = {"index": chunk.index, "delta": delta, "logprobs": logprobs, "finish_reason": chunk.finish_reason}
            events.append(self._event(head, [choice]))
        return b"".join(events)

    def end(self, head: Head, usage: Usage) -> bytes:
        if not self._open:
            self._open[0] = True
        ends: list[dict[str, Any]] = [
            {"index": index, "delta": {}, "logprobs": None, "finish_reason": "stop"}
            for index, is_open in self._open.items()
            if is_open
        ]
        events = [self._event(head, [choice]) for choice in ends]
        if self._include_usage:
            events.append(self._event(head, [], usage))
        return b"".join(events) + DONE

    def failed(self, head: Head, error: ApiError) -> bytes:
        return event({**error.fields(), "id": f"chatcmpl-{head.id}"})

    def whole(self, head: Head, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        answers = []
        for index, choice in enumerate(choices):
            calls = [plain.flatten(_whole_call(call)) for call in choice.tool_calls]
            message: dict[str, Any] = {
                "role": "assistant",
                "content": choice.text if choice.text or not calls else None,
            }
            message |= {"refusal": None, **({"tool_calls": calls} if calls else {})}
            logprobs = None if choice.logprobs is None else {"content": _logprobs(choice.logprobs), "refusal": None}
            reason = choice.finish_reason
            answers.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
        return {
            "id": f"chatcmpl-{head.id}",
            "object": "chat.completion",
            "created": head.created,
            "model": head.model,
            "choices": answers,
            "usage": usage_fields(usage),
            "system_fingerprint": next((choice.served_by for choice in choices if choice.served_by), None),
        }

    def _event(self, head: Head, choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
        asked = {"usage": usage and usage_fields(usage)} if self._include_usage else {}
        return event(
            {
                "id": f"chatcmpl-{head.id}",
                "object": "chat.completion.chunk",
                "created": head.created,
                "model": head.model,
                "choices": choices,
                "system_fingerprint": self._served_by,
                **asked,
            }
        )


def _part_of_call(at: int, call: ToolCall) -> dict[str, Any]:
    part: dict[str, Any] = plain.flatten(call)
    return {**part, "index": at if call.index is None else call.index}


def _whole_call(call: ToolCall) -> ToolCall:
    return ToolCall(call.function, call.id or "call_0", "function")


def _logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [_logprob(one) | {"top_logprobs": [_logprob(other) for other in one.top_logprobs or ()]} for one in tokens]


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.token, "logprob": one.logprob, "bytes": list(one.token.encode("utf-8", "replace"))}
