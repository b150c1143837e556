"""One answer in an engine that gives tokens, and in the queue before it."""

from __future__ import annotations

from typing import Any

from torchserve_dag.runtime.handler import Reply
from torchserve_dag.runtime.messages import Chat, FinishReason, InputError, Prompt, TextChunk
from torchserve_dag.runtime.models.language.tokenizer import Tokenizer
from torchserve_dag.runtime.models.language.writer import AnswerWriter, Detokenizer

WAITING = 16
"""The most answers that wait in an engine for a place; the worker's own queue is before this one."""
BY_WRITER = frozenset({"echo", "tools", "tool_choice", "parallel_tool_calls"})
"""Fields that need the chat template and the writer only, not the engine."""

COLDEST = 1e-4
"""A lower temperature draws the most probable token, and its quotients overflow."""


def drawing(request: Chat | Prompt) -> dict[str, Any]:
    """How to draw tokens, in the words of transformers and onnxruntime-genai; the rest is left to the model."""
    temperature, top_p = request.temperature, request.top_p
    if top_p == 0 or (temperature is not None and temperature < COLDEST):
        return {"do_sample": False}
    asked = {"temperature": temperature, "top_p": top_p}
    given = {name: float(value) for name, value in asked.items() if value is not None}
    return {"do_sample": True, **given} if given else {}


class EngineAnswer:
    """The tokens of a request's answer, written as text. Its methods are called by the engine's thread."""

    def __init__(
        self, request: Chat | Prompt, most: int, reply: Reply[TextChunk], tokenizer: Tokenizer, served_by: str
    ) -> None:
        """`most`: the limit of its tokens. Raises InputError."""
        if isinstance(request, Chat) and request.tool_choice not in {None, "auto", "none"}:
            raise InputError(f'tool_choice: {served_by} knows "auto" and "none".')
        self.request, self.most = request, most
        self.prompt = tokenizer(request)
        self.cancelled = False
        """Whether nobody waits for the rest: it was cancelled, or has come to a stop string."""
        self._writer = AnswerWriter(reply, request, len(self.prompt), served_by)
        self._text = Detokenizer(tokenizer.decode)
        self._tokens = 0

    def add(self, token: int) -> None:
        """Write the next token."""
        self._tokens += 1
        if not self.cancelled:
            self.cancelled = not self._writer.write(0, self._text.add([token]))

    def finish(self, reason: FinishReason) -> None:
        """There are no more."""
        self._writer.write(0, self._text.rest())
        self._writer.finish(0, "stop" if self.cancelled else reason, self._tokens)

    def fail(self, error: BaseException) -> None:
        self._writer.fail(error)
