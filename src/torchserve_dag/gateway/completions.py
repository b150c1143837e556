"""`/v1/completions`: OpenAI's JSON as Prompts, and chunks of text as OpenAI's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from torchserve_dag.gateway import fields
from torchserve_dag.gateway.errors import ApiError
from torchserve_dag.gateway.form import DONE, Head, event, usage_fields
from torchserve_dag.runtime.messages import Prompt, TextChunk, TokenLogprob, Usage
from torchserve_dag.runtime.models.language.choice import Choice

MAX_PROMPTS = 128


def read(data: dict[str, Any]) -> list[Prompt]:
    """The prompts of a request, of which `model`, `stream` and `stream_options` are taken out. Raises ApiError."""
    fields.drop_neutral(data, {"best_of": (1,), "suffix": ("",)})
    prompt = data.get("prompt")
    texts = prompt if isinstance(prompt, list) else [prompt]
    if not 1 <= len(texts) <= MAX_PROMPTS or not all(isinstance(text, str) for text in texts):
        message = f"prompt: it is a text, or a list of 1 to {MAX_PROMPTS} texts; tokens by their numbers are not read."
        raise ApiError(HTTPStatus.BAD_REQUEST, message, param="prompt")
    return [fields.message_of(Prompt, {**data, "prompt": text}) for text in texts]


class CompletionForm:
    """An answer as a text completion."""

    def __init__(self, *, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._open: dict[int, bool] = {}
        self._written: dict[int, int] = {}
        """Index of each answer → how many characters have been sent of it."""
        self._served_by: str | None = None

    def chunks(self, head: Head, chunks: Sequence[TextChunk]) -> bytes:
        events = []
        for chunk in chunks:
            self._open[chunk.index] = chunk.finish_reason is None
            self._served_by = chunk.served_by or self._served_by
            before = self._written.get(chunk.index, 0)
            self._written[chunk.index] = before + len(chunk.text)
            logprobs = None if chunk.logprobs is None else _logprobs(chunk.logprobs, before)
            events.append(self._event(head, [_choice(chunk.index, chunk.text, logprobs, chunk.finish_reason)]))
        return b"".join(events)

    def end(self, head: Head, usage: Usage) -> bytes:
        if not self._open:
            self._open[0] = True
        open_ones = [index for index, is_open in self._open.items() if is_open]
        events = [self._event(head, [_choice(index, "", None, "stop")]) for index in open_ones]
        if self._include_usage:
            events.append(self._event(head, [], usage))
        return b"".join(events) + DONE

    def failed(self, head: Head, error: ApiError) -> bytes:
        return event({**error.fields(), "id": f"cmpl-{head.id}"})

    def whole(self, head: Head, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        answers = [
            _choice(at, one.text, None if one.logprobs is None else _logprobs(one.logprobs, 0), one.finish_reason)
            for at, one in enumerate(choices)
        ]
        served_by = next((choice.served_by for choice in choices if choice.served_by), None)
        return {**_fields(head, answers, served_by), "usage": usage_fields(usage)}

    def _event(self, head: Head, choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
        asked = {"usage": usage and usage_fields(usage)} if self._include_usage else {}
        return event({**_fields(head, choices, self._served_by), **asked})


def _fields(head: Head, choices: list[dict[str, Any]], served_by: str | None) -> dict[str, Any]:
    return {
        "id": f"cmpl-{head.id}",
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "choices": choices,
        "system_fingerprint": served_by,
    }


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """`offset`: of the first token in the answer's text, in characters."""
    offsets = []
    for one in tokens:
        offsets.append(offset)
        offset += len(one.token)
    return {
        "tokens": [one.token for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [{other.token: other.logprob for other in one.top_logprobs or ()} for one in tokens],
        "text_offset": offsets,
    }
