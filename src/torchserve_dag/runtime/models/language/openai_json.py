"""OpenAI's JSON: a request as the body of `chat/completions` or `completions`, and what a server answers as chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.messages import (
    Chat,
    FinishReason,
    FunctionCall,
    InputError,
    Prompt,
    PromptTokensDetails,
    TextChunk,
    TokenLogprob,
    ToolCall,
    Usage,
)

DONE = "[DONE]"
"""The data of a stream's last event."""
MOST_EVENT_BYTES = 8 << 20
MOST_SENTENCE = 500
"""Characters of what a server says of a failure."""
LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON does not have."""
REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}
FAILED = {"abort", "error"}
"""What vLLM, and routers before hosted models, give as finish reason of an answer that they did not finish."""


class UpstreamError(InputError):
    """A server that speaks OpenAI's API refused a request, or did not answer it to the end."""

    type = "Upstream"

    def __init__(self, message: str, status: int = HTTPStatus.BAD_GATEWAY) -> None:
        super().__init__(message, status)


def path_of(request: Chat | Prompt) -> str:
    """Where a request goes, below the API's base address."""
    return "chat/completions" if isinstance(request, Chat) else "completions"


def body_of(request: Chat | Prompt, model: str, most_tokens: int, limit: str = "max_tokens") -> dict[str, Any]:
    """A request as JSON data, with an answer of at most `most_tokens` tokens, as events. `limit`: what the server calls
    that limit. A LoRA adapter is part of the model's name in OpenAI's API, so its field is left out. Raises InputError
    if a schema of the request is nested too deeply.
    """
    try:
        body: dict[str, Any] = plain.flatten(request)
    except RecursionError:
        raise InputError("The request is nested too deeply.") from None
    for name in ("adapter", "max_tokens", "max_completion_tokens"):
        body.pop(name, None)
    return body | {
        "model": model,
        limit: most_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class EventReader:
    """The data of server-sent events, out of the bytes of a stream as they come."""

    def __init__(self) -> None:
        self._line = bytearray()
        """What has come of a line."""
        self._data: list[bytes] = []
        """The data of the event that has begun."""
        self._size = 0

    def read(self, part: bytes) -> Iterator[str]:
        """The data of the events that end in `part`. Raises UpstreamError for one of more than 8 MiB."""
        *lines, rest = part.split(b"\n")
        for line in lines:
            whole = bytes(self._line) + line
            self._line.clear()
            field, _, value = whole.rstrip(b"\r").partition(b":")
            if field == b"data":
                self._data.append(value.removeprefix(b" "))
                self._size += len(value)
            elif not field and not value and self._data:
                yield b"\n".join(self._data).decode(errors="replace")
                self._data, self._size = [], 0
        self._line += rest
        if self._size + len(self._line) > MOST_EVENT_BYTES:
            raise UpstreamError("The model's server sent an event of more than 8 MiB.")


def parse(text: str | bytes) -> dict[str, Any]:
    """JSON of a server. Raises UpstreamError if it is no JSON object."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise UpstreamError("The model's server sent what is no JSON object.")
    return data


def failure_of(status: int, text: str | bytes) -> UpstreamError:
    """What a server answered instead of a model's answer, with its sentence if it gave one."""
    try:
        sentence = _sentence(json.loads(text))
    except (ValueError, RecursionError):
        sentence = ""
    return UpstreamError(sentence or f"The model's server answered {status}.", status)


def _sentence(data: Any) -> str:
    """The sentence in the JSON of a failure: OpenAI's form, or a framework's."""
    while isinstance(data, Mapping):
        data = next((data[key] for key in ("error", "message", "detail") if data.get(key)), "")
    return _whole(data)[:MOST_SENTENCE] if isinstance(data, str) else ""


class ChunkReader:
    """The chunks of the answers to one request, out of a server's events, or of its whole answer.

    Of each answer the last chunk has the finish reason, and the very last chunk the usage: it is held back until the
    server has told the usage.
    """

    def __init__(self, engine: str, answers: int = 1) -> None:
        self._engine = engine
        self._answers = answers
        self._open = set(range(answers))
        self._held: TextChunk | None = None
        self.model = ""
        """The model, as the server names it."""
        self.usage: Usage | None = None
        """What the answers have cost, as far as the server has told."""
        self.pieces = 0
        """Pieces of text, of which most servers send one for each token."""

    @property
    def complete(self) -> bool:
        """Whether every answer has a finish reason."""
        return not self._open

    def read(self, event: Mapping[str, Any]) -> list[TextChunk]:
        """The chunks of an event's data. Raises UpstreamError for a failure, and for what is not OpenAI's JSON."""
        if event.get("error"):
            raise self._failure(event["error"])
        try:
            self.model = event.get("model") or self.model
            self.usage = _usage(event["usage"]) if event.get("usage") else self.usage
            return [chunk for choice in event.get("choices") or [] for chunk in self._choice(choice)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            message = f"The model's server sent what is no answer of OpenAI's API ({type(error).__name__})."
            raise UpstreamError(message) from error

    def end(self, prompt_tokens: int = 0) -> list[TextChunk]:
        """The very last chunk, once the server has sent everything. `prompt_tokens`: an estimate, for a server that
        tells no usage. Raises UpstreamError if an answer has no finish reason.
        """
        if self._open or self._held is None:
            raise UpstreamError("The model's server stopped in the middle of its answer.")
        usage = self.usage or Usage.of(prompt_tokens, self.pieces)
        served_by = f"{self._engine} {self.model}".rstrip()
        return [replace(self._held, usage=usage, served_by=served_by)]

    def _choice(self, choice: Mapping[str, Any]) -> list[TextChunk]:
        index = choice.get("index") or 0
        if index not in range(self._answers):
            raise ValueError(index)
        if index not in self._open:
            return []
        said = choice.get("delta") or choice.get("message") or {}
        text = _whole(said.get("content") or said.get("refusal") or choice.get("text") or "")
        calls = [_call(call, place) for place, call in enumerate(said.get("tool_calls") or [])]
        reason = choice.get("finish_reason") or None
        if reason in FAILED:
            raise UpstreamError("The model's server did not finish its answer.")
        logprobs = _logprobs(choice.get("logprobs") or {})
        self.pieces += bool(text or calls)
        if not (text or calls or logprobs or reason):
            return []
        chunk = TextChunk(text, index, REASONS.get(reason, "stop") if reason else None, None, calls or None, logprobs)
        ready, self._held = ([self._held] if self._held else []), None
        if not reason:
            return [*ready, chunk]
        self._open.discard(index)
        self._held = chunk
        return ready

    def _failure(self, error: Any) -> UpstreamError:
        code = error.get("code") if isinstance(error, Mapping) else None
        known = isinstance(code, int) and HTTPStatus.BAD_REQUEST <= code < 600  # noqa: PLR2004 (the end of HTTP's)
        return failure_of(code if known and code else HTTPStatus.BAD_GATEWAY, json.dumps({"error": error}))


def _usage(data: Mapping[str, Any]) -> Usage:
    cached = (data.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    prompt, completion = data.get("prompt_tokens") or 0, data.get("completion_tokens") or 0
    return Usage(prompt, completion, data.get("total_tokens") or prompt + completion, PromptTokensDetails(cached))


def _call(data: Mapping[str, Any], place: int) -> ToolCall:
    """A call of a tool, or a part of one. In a whole answer the calls have no index: it is their place."""
    function = data.get("function") or {}
    called = FunctionCall(function.get("name"), function.get("arguments"))
    index = data.get("index")
    return ToolCall(called, data.get("id"), "function" if data.get("type") else None, place if index is None else index)


def _logprobs(data: Mapping[str, Any]) -> list[TokenLogprob] | None:
    """The tokens of a chat's answer (`content`), or of a completion (lists side by side)."""
    if "content" in data:
        found = [
            _token(one["token"], one["logprob"], [(o["token"], o["logprob"]) for o in one.get("top_logprobs") or []])
            for one in data["content"] or []
        ]
        return found or None
    tokens, values = data.get("tokens") or [], data.get("token_logprobs") or []
    tops = data.get("top_logprobs") or [None] * len(tokens)
    triples = zip(tokens, values, tops, strict=True)
    return [  # a prompt's first token, which has none, is left out
        _token(token, value, list((top or {}).items())) for token, value, top in triples if value is not None
    ] or None


def _token(token: str, logprob: float, top: list[tuple[str, float]]) -> TokenLogprob:
    others = [TokenLogprob(_whole(name), _finite(value)) for name, value in top]
    return TokenLogprob(_whole(token), _finite(logprob), others or None)


def _finite(value: float | None) -> float:
    return float(value) if value is not None and math.isfinite(value) else LEAST_LOGPROB


def _whole(text: str) -> str:
    """Text without half surrogate pairs, which JSON can name and UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
