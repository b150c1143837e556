"""`/v1/responses`, with texts and photos: OpenAI's JSON as a Chat, and chunks of text as OpenAI's JSON and events."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from torchserve_dag.gateway import fields
from torchserve_dag.gateway.errors import ApiError
from torchserve_dag.gateway.form import Head, event
from torchserve_dag.runtime.messages import Chat, TextChunk, Usage
from torchserve_dag.runtime.models.language.choice import Choice

STATELESS = "no conversation is kept here; send all of it as input"
NEUTRAL: dict[str, Sequence[Any]] = {
    "service_tier": ("auto", "default"),
    "truncation": ("disabled",),
    "background": (False,),
    "include": ([],),
    "tools": ([],),
}
_SAME = ("temperature", "top_p")
_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "input_image": "image_url"}


def read(data: dict[str, Any]) -> Chat:
    """The chat of a request, of which `model` and `stream` are taken out. Raises ApiError."""
    for name, holds in (("store", False), ("previous_response_id", None), ("conversation", None)):
        if name in data and data.pop(name) != holds:
            raise ApiError(HTTPStatus.BAD_REQUEST, f"{name}: {STATELESS}.", param=name, code="unsupported_parameter")
    fields.drop_neutral(data, NEUTRAL)
    fields.take(data, "metadata", dict, {})
    chat: dict[str, Any] = {name: data.pop(name) for name in _SAME if name in data}
    if "max_output_tokens" in data:
        chat["max_completion_tokens"] = data.pop("max_output_tokens")
    if response_format := _format(fields.take(data, "text", dict, {})):
        chat["response_format"] = response_format
    instructions = fields.take(data, "instructions", str, "")
    before = [{"role": "system", "content": instructions}] if instructions else []
    given = data.pop("input", None)
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list) or not items:
        raise ApiError(HTTPStatus.BAD_REQUEST, "input: it is a text, or a list of messages.", param="input")
    chat["messages"] = [*before, *(_message(item, f"input[{at}]") for at, item in enumerate(items))]
    for name in data:
        fields.unknown(name)
    return fields.message_of(Chat, chat)


def _format(text: dict[str, Any]) -> dict[str, Any] | None:
    """`text.format` as `response_format`."""
    wanted = fields.take(text, "format", dict, {})
    for name in text:
        fields.unknown(name, "text.")
    if wanted.get("type") != "json_schema":
        return wanted or None
    return {"type": "json_schema", "json_schema": {name: part for name, part in wanted.items() if name != "type"}}


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict) or item.get("type", "message") != "message" or "role" not in item:
        message = f"{where}: only messages are read here, with role and content."
        raise ApiError(HTTPStatus.BAD_REQUEST, message, param=where)
    content = item.get("content")
    if isinstance(content, list):
        content = [_part(part, f"{where}.content[{at}]") for at, part in enumerate(content)]
    return {"role": item["role"], "content": content}


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = _PARTS.get(part.get("type", "")) if isinstance(part, dict) else None
    if kind is None:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"{where}: only texts and photos are read here.", param=where)
    if kind == "text":
        return {"type": "text", "text": part.get("text")}
    photo = {"url": part.get("image_url"), "detail": part.get("detail")}
    return {"type": "image_url", "image_url": fields.without_nulls(photo)}


class ResponseForm:
    """An answer as a response with one message."""

    def __init__(self, asked: dict[str, Any]) -> None:
        """`asked`: the request as the client sent it, of which a response repeats some fields."""
        self._asked = asked
        self._number = 0
        self._text: list[str] = []
        self._reason = "stop"

    def _begin(self, head: Head) -> bytes:
        response = self._response(head, "in_progress", [])
        item = {**_message_item(head, "", "in_progress"), "content": []}
        part = _text_part("")
        return b"".join(
            (
                self._event("response.created", response=response),
                self._event("response.in_progress", response=response),
                self._event("response.output_item.added", output_index=0, item=item),
                self._event("response.content_part.added", **_place(head), part=part),
            )
        )

    def chunks(self, head: Head, chunks: Sequence[TextChunk]) -> bytes:
        events = [] if self._number else [self._begin(head)]
        for chunk in chunks:
            self._reason = chunk.finish_reason or self._reason
            if chunk.text:
                self._text.append(chunk.text)
                events.append(self._event("response.output_text.delta", **_place(head), delta=chunk.text, logprobs=[]))
        return b"".join(events)

    def end(self, head: Head, usage: Usage) -> bytes:
        text = "".join(self._text)
        response = self._whole(head, text, self._reason, usage)
        (item,) = response["output"]
        return b"".join(
            (
                self._event("response.output_text.done", **_place(head), text=text, logprobs=[]),
                self._event("response.content_part.done", **_place(head), part=_text_part(text)),
                self._event("response.output_item.done", output_index=0, item=item),
                self._event(f"response.{response['status']}", response=response),
            )
        )

    def failed(self, head: Head, error: ApiError) -> bytes:
        """With `error` itself, too, which makes OpenAI's own clients raise."""
        said = {"code": error.code or error.type, "message": error.message, "param": error.param}
        response = {**self._response(head, "failed", []), "error": {"code": "server_error", "message": error.message}}
        return self._event("response.failed", response=response) + self._event("error", **said, **error.fields())

    def whole(self, head: Head, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        return self._whole(head, choices[0].text, choices[0].finish_reason, usage)

    def _whole(self, head: Head, text: str, reason: str, usage: Usage) -> dict[str, Any]:
        cut = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(reason)
        status = "incomplete" if cut else "completed"
        return {
            **self._response(head, status, [_message_item(head, text, status)]),
            "incomplete_details": {"reason": cut} if cut else None,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.total_tokens,
            },
        }

    def _response(self, head: Head, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        repeated = ("instructions", "max_output_tokens", "temperature", "top_p")
        return {
            "id": f"resp_{head.id}",
            "object": "response",
            "created_at": head.created,
            "status": status,
            "model": head.model,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "metadata": self._asked.get("metadata") or {},
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "store": False,
            "previous_response_id": None,
            "text": {"format": {"type": "text"}, **(self._asked.get("text") or {})},
            "usage": None,
            **{name: self._asked.get(name) for name in repeated},
        }

    def _event(self, kind: str, **more: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **more}, kind)


def _place(head: Head) -> dict[str, Any]:
    return {"item_id": f"msg_{head.id}", "output_index": 0, "content_index": 0}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message_item(head: Head, text: str, status: str) -> dict[str, Any]:
    parts = [_text_part(text)]
    return {"id": f"msg_{head.id}", "type": "message", "role": "assistant", "status": status, "content": parts}
