"""Prompts that were counted, until they are started: none is split into tokens twice."""

from __future__ import annotations

import threading
from collections import OrderedDict

from torchserve_dag.runtime.messages import Chat, Prompt
from torchserve_dag.runtime.models.language.engine import PromptReader, PromptTokens

KEPT = 64
"""Prompts that are kept; a request that waits for longer is split again."""


class CountedPrompts:
    """The latest prompts that were counted. Its methods may be called from any thread."""

    def __init__(self, read: PromptReader) -> None:
        self._read = read
        self._kept: OrderedDict[int, tuple[Chat | Prompt, PromptTokens]] = OrderedDict()
        self._lock = threading.Lock()

    def count(self, request: Chat | Prompt) -> int:
        """The tokens of a request's prompt. Raises InputError."""
        prompt = self._read(request)
        with self._lock:
            self._kept[id(request)] = request, prompt
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return len(prompt.tokens)

    def take(self, request: Chat | Prompt) -> PromptTokens:
        """A request's prompt, which is started now. Raises InputError."""
        with self._lock:
            kept = self._kept.pop(id(request), None)
        return kept[1] if kept and kept[0] is request else self._read(request)
