"""Calls of tools in a model's text, in the form of Hermes, which Qwen and many others write.

<tool_call>
{"name": "weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from torchserve_dag.runtime.messages import FunctionCall, ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_CALLS = 64
"""Of an answer."""


class ToolCallText:
    """A growing text, divided into content and calls. A call comes whole, once it has closed.

    What stands between the marks and is no call, or never closes, is content.
    """

    def __init__(self, most: int = MOST_CALLS) -> None:
        """`most`: calls; nothing comes after the last."""
        self._most = most
        self._held = ""
        """The end of the text, which is the beginning of a mark or of a call."""
        self.calls = 0
        """Calls so far."""

    @property
    def full(self) -> bool:
        """Whether it has as many calls as there may be."""
        return self.calls >= self._most

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """The content, and the calls, that the text adds."""
        self._held += text
        content = ""
        calls: list[ToolCall] = []
        while not self.full and (found := _closed(self._held)):
            before, body, self._held = found
            call = self._read(body)
            content += before if call else f"{before}{OPEN}{body}{CLOSE}"
            calls += [call] if call else []
        if self.full:
            self._held = ""
        certain = _certain(self._held)
        content, self._held = content + self._held[:certain], self._held[certain:]
        return "" if self.calls and content.isspace() else content, calls  # blank lines between calls say nothing

    def rest(self) -> str:
        """At the end: the content that was held back."""
        held, self._held = self._held, ""
        return held

    def _read(self, body: str) -> ToolCall | None:
        """What stands between the marks as a call, None if it is none."""
        try:
            call: Any = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or not isinstance(name := call.get("name"), str):
            return None
        arguments = call.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self.calls += 1
        return ToolCall(FunctionCall(name, text), f"call_{uuid.uuid4().hex[:24]}", "function", self.calls - 1)


def _closed(text: str) -> tuple[str, str, str] | None:
    """The text before the first call, between its marks, and after it; None if there is none that has closed."""
    before, _, after = text.partition(OPEN)
    body, closing, rest = after.partition(CLOSE)
    return (before, body, rest) if closing else None


def _certain(text: str) -> int:
    """How many characters are content, whatever follows: those before a mark, or the beginning of one."""
    found = text.find(OPEN)
    if found >= 0:
        return found
    begun = (size for size in range(min(len(text), len(OPEN) - 1), 0, -1) if OPEN.startswith(text[-size:]))
    return len(text) - next(begun, 0)
