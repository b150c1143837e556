"""A language model and what it writes, in a test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchserve_dag.runtime.compute.placement import Placement
from torchserve_dag.runtime.messages import Chat, Prompt, TextChunk
from torchserve_dag.runtime.models.language.model import LanguageModel
from torchserve_dag.runtime.models.language.settings import LanguageSettings

LIMIT_S = 300.0
"""Only what hangs takes so long."""


@dataclass
class Written:
    """A reply that keeps what comes."""

    chunks: list[TextChunk] = field(default_factory=list)
    error: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def chunk(self, chunk: TextChunk) -> None:
        self.chunks.append(chunk)

    def end(self) -> None:
        self.ended.set()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.ended.set()

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def last(self) -> TextChunk:
        return self.chunks[-1]

    def wait(self) -> Written:
        assert self.ended.wait(LIMIT_S), "it hangs"
        return self


def load(folder: Path, model: str, engine: Any, **settings: Any) -> LanguageModel:
    settings = {"exact": True, **settings}
    return LanguageModel.load(
        folder, LanguageSettings(model, engine=engine, **settings), Placement(torch.device("cpu"))
    )


def write(model: LanguageModel, request: Chat | Prompt) -> Written:
    """What a model answers, once it has ended."""
    written = Written()
    model.start(request, written)
    return written.wait()


def wait_until(fact: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT_S
    while not fact():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)
