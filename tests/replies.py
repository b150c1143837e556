"""Where a test has a model with an engine of its own put its chunks."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torchserve_dag import Chat, LanguageModel, Prompt, TextChunk, Usage

HANG_S = 120.0
"""Only a hang takes so long."""


class KeptReply:
    """Keeps the chunks of one answer."""

    def __init__(self, on_chunk: Callable[[TextChunk], None] = lambda _: None) -> None:
        self.chunks: list[TextChunk] = []
        self.error: BaseException | None = None
        self._on_chunk = on_chunk
        self._ended = threading.Event()

    def chunk(self, chunk: TextChunk) -> None:
        self.chunks.append(chunk)
        self._on_chunk(chunk)

    def end(self) -> None:
        self._ended.set()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self._ended.set()

    def wait(self) -> KeptReply:
        """Until its end; raises what it failed with."""
        assert self._ended.wait(HANG_S), "no end"
        if self.error is not None:
            raise self.error
        return self

    def text(self, index: int = 0) -> str:
        return "".join(chunk.text for chunk in self.chunks if chunk.index == index)

    def reason(self, index: int = 0) -> str | None:
        return next(
            (chunk.finish_reason for chunk in self.chunks if chunk.index == index and chunk.finish_reason), None
        )

    @property
    def usage(self) -> Usage:
        usage = self.chunks[-1].usage
        assert usage is not None
        return usage


def ask(model: LanguageModel, request: Chat | Prompt) -> KeptReply:
    """The whole answer to a request."""
    reply = KeptReply()
    model.start(request, reply)
    return reply.wait()
