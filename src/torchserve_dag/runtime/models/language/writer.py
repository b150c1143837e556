"""From an engine's tokens to chunks: whole characters, no stop strings, and at the end what the answers have cost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from torchserve_dag.runtime.handler import Reply
from torchserve_dag.runtime.messages import Chat, FinishReason, Prompt, TextChunk, TokenLogprob, Usage
from torchserve_dag.runtime.models.language.tool_calls import MOST_CALLS, ToolCallText

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no whole character, or not yet."""
LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8: after so many tokens an incomplete character will not become complete any more."""


class Detokenizer:
    """The text of one answer's tokens, as these come. A character whose bytes are several tokens comes with the last.

    It decodes a window of the last tokens only: a token's text depends on the tokens before it (of a word, the first
    has a blank or not), but not on those before these.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._written = 0
        """How many tokens of the window have been written."""

    def add(self, tokens: Sequence[int]) -> str:
        """The text that the tokens add."""
        self._tokens += tokens
        before, now = self._decode(self._tokens[: self._written]), self._decode(self._tokens)
        waiting = len(self._tokens) - self._written
        if now.endswith(INCOMPLETE) and waiting < LONGEST_CHARACTER:
            return ""
        return self._take(before, now)

    def rest(self) -> str:
        """At the end: what was held back, with a character that has remained incomplete."""
        return self._take(self._decode(self._tokens[: self._written]), self._decode(self._tokens))

    def _take(self, before: str, now: str) -> str:
        self._tokens = self._tokens[self._written :]
        self._written = len(self._tokens)
        return now[len(before) :]


class AnswerWriter:
    """Writes the answers to one request: its `n` texts, each up to its first stop string, and the usage at the end.

    Methods for one answer are called by one thread at a time.
    """

    def __init__(self, reply: Reply[TextChunk], request: Chat | Prompt, prompt_tokens: int, served_by: str) -> None:
        self._reply, self._served_by = reply, served_by
        self._writers = [StoppedText(request.stops) for _ in range(request.n or 1)]
        self._tools = [_tool_calls(request) for _ in self._writers]
        self._usage = Usage.of(prompt_tokens)
        self._open = len(self._writers)
        self._lock = threading.Lock()
        if isinstance(request, Prompt) and request.echo:
            for index in range(self._open):
                reply.chunk(TextChunk(request.prompt, index))

    def write(self, index: int, text: str, logprobs: list[TokenLogprob] | None = None) -> bool:
        """Write more of an answer. Returns whether it goes on: not after a stop string, nor the last call of a tool."""
        writer, tools = self._writers[index], self._tools[index]
        if writer.stopped:
            return False
        ready, calls = writer.add(text), None
        if tools is not None:
            ready, calls = tools.add(ready)
        if ready or calls or logprobs:
            self._reply.chunk(TextChunk(ready, index, tool_calls=calls or None, logprobs=logprobs))
        return not (writer.stopped or (tools is not None and tools.full))

    def finish(self, index: int, reason: FinishReason, completion_tokens: int, cached_tokens: int = 0) -> None:
        """An answer has ended, after so many tokens; the last one to end ends the reply."""
        writer, tools = self._writers[index], self._tools[index]
        reason = "stop" if writer.stopped else reason
        text, calls = writer.rest(), None
        if tools is not None:
            text, calls = tools.add(text)
            text += tools.rest()
            reason = "tool_calls" if tools.calls and reason == "stop" else reason
        with self._lock:
            self._usage += Usage.of(0, completion_tokens, cached_tokens)
            self._open -= 1
            last = not self._open
        usage, served_by = (self._usage, self._served_by) if last else (None, None)
        self._reply.chunk(TextChunk(text, index, reason, usage, calls or None, served_by=served_by))
        if last:
            self._reply.end()

    def fail(self, error: BaseException) -> None:
        self._reply.fail(error)


def _tool_calls(request: Chat | Prompt) -> ToolCallText | None:
    """What finds calls of tools in an answer; None where there are no tools."""
    if isinstance(request, Prompt) or not request.tools or request.tool_choice == "none":
        return None
    return ToolCallText(most=1 if request.parallel_tool_calls is False else MOST_CALLS)


class StoppedText:
    """A text up to its first stop string. The end of it that may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """What of the text may leave now."""
        if not self._stops:
            return text
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped, ready, self._held = True, self._held[: min(found)], ""
            return ready
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(ready) :]
        return ready

    def rest(self) -> str:
        """At the end: what was held back, and did not become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text are the first of a stop string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
