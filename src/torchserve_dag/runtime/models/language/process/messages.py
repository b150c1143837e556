"""The messages between a worker and the process of an engine."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torchserve_dag.runtime.handler import EngineLoad
from torchserve_dag.runtime.messages import Chat, InputError, Prompt, TextChunk
from torchserve_dag.runtime.models.language.engine import PromptTokens
from torchserve_dag.runtime.models.language.settings import LanguageSettings

if TYPE_CHECKING:  # it imports torch, which not every engine needs
    from torchserve_dag.runtime.compute.placement import Placement


# To the engine's process.


class EngineSpec(NamedTuple):
    """The first message: what to load."""

    module: str
    """The engine's module, with its `load`."""
    folder: Path
    settings: LanguageSettings
    placement: Placement | None
    """None for an engine that computes on the CPU only: its process imports no torch."""


class StartAnswer(NamedTuple):
    """Start an answer."""

    answer: int
    """The answer's number, which none had before."""
    request: Chat | Prompt
    prompt: PromptTokens
    most_tokens: int


class CancelAnswer(NamedTuple):
    """Nobody waits for an answer any more."""

    answer: int


# To the worker.


class EngineLoaded(NamedTuple):
    """The engine is ready: see LanguageEngine."""

    supports: frozenset[str]
    room: int
    context: int


class EngineNotLoaded(NamedTuple):
    """Why the engine cannot be loaded."""

    error: Exception


class AnswerFailed(NamedTuple):
    """Why an answer ends: an InputError's parts, or an engine's fault, which has no status."""

    message: str
    status: int | None = None
    type: str = ""

    @classmethod
    def of(cls, error: BaseException) -> AnswerFailed:
        if isinstance(error, InputError):
            return cls(error.message, error.status, error.type)
        return cls(f"{type(error).__name__}: {error}")

    def exception(self) -> Exception:
        """What the answer's reply fails with."""
        if self.status is None:
            return RuntimeError(self.message)
        error = InputError(self.message, self.status)
        error.type = self.type
        return error


Event = TextChunk | AnswerFailed | None
"""What an answer gets: a chunk, why it ends, or that it has ended."""


class Progress(NamedTuple):
    """What the answers have got: in a step, mostly. It comes now and then even where they have got nothing."""

    events: list[tuple[int, Event]]
    """Each with its answer's number."""
    load: EngineLoad
    hangs: bool
    """Whether the engine says so itself."""


def carried(error: Exception) -> Exception:
    """An exception as it can be sent: the same, or its words where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (it was pickled here)
    except Exception:  # noqa: BLE001 (whatever its class raises)
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
