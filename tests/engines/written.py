"""What a test does with an engine of a language model: start answers, and wait for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from torchserve_dag import Chat, Prompt, TextChunk
from torchserve_dag.runtime.messages import Usage
from torchserve_dag.runtime.models.language.engine import Cancel, LanguageEngine

LIMIT_S = 120.0
"""For one answer, on the slowest machine."""


class Written:
    """A reply that keeps what it gets."""

    def __init__(self) -> None:
        self.chunks: list[TextChunk] = []
        self.error: BaseException | None = None
        self.ends = 0
        """How often it was ended; once, if all is well."""
        self.cancel: Cancel = lambda: None
        self._news = threading.Condition()

    def chunk(self, chunk: TextChunk) -> None:
        with self._news:
            self.chunks.append(chunk)
            self._news.notify_all()

    def end(self) -> None:
        with self._news:
            self.ends += 1
            self._news.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._news:
            self.error = self.error or error
            self.ends += 1
            self._news.notify_all()

    def wait_for(self, what: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        with self._news:
            assert self._news.wait_for(what, limit_s), f"not within {limit_s} seconds; {len(self.chunks)} chunks came"

    def wait(self) -> Written:
        """Wait for its end. Raises what it failed with."""
        self.wait_for(lambda: bool(self.ends))
        if self.error:
            raise self.error
        return self

    def text(self, index: int = 0) -> str:
        return "".join(chunk.text for chunk in self.chunks if chunk.index == index)

    def reasons(self) -> dict[int, str]:
        """The finish reason of each answer."""
        return {chunk.index: chunk.finish_reason for chunk in self.chunks if chunk.finish_reason}

    @property
    def usage(self) -> Usage:
        usage = self.chunks[-1].usage
        assert usage
        return usage


def start(engine: LanguageEngine, request: Chat | Prompt, most: int = 16) -> Written:
    """Start an answer, without waiting for it."""
    written = Written()
    written.cancel = engine.start(request, most, written)
    return written


def until(what: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Wait until something holds, which is looked at again and again."""
    end = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.01)
