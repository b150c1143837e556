"""The interface of a language model's engine: chats and prompts in, chunks of text out.

An adapter is one module of this folder. It starts requests in the engine's own continuous batch, and writes what the
engine gives as chunks. It schedules nothing itself.

An engine that computes in Python's process has two sides: `PromptReader` makes tokens of requests, in the worker, and
`StepEngine` computes the answers, in a process of its own (process/).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torchserve_dag.runtime.handler import EngineLoad, Reply
from torchserve_dag.runtime.messages import Chat, Prompt, TextChunk

Cancel = Callable[[], None]


class LanguageEngine(Protocol):
    """A loaded engine with its model. Its methods may be called from any thread."""

    supports: frozenset[str]
    """The fields of Chat and Prompt that it honours, beside those in `ALWAYS`; `photos` stands for photos in a chat. A
    request with another field is refused before it reaches the engine."""
    room: int
    """How many answers it may have in progress."""
    context: int
    """The most tokens of a prompt and its answer together."""

    def count(self, request: Chat | Prompt) -> int:
        """The tokens of a request's prompt; an estimate where the tokenizer is the server's. Raises InputError."""

    def start(self, request: Chat | Prompt, most_tokens: int, reply: Reply[TextChunk]) -> Cancel:
        """Start an answer of at most `most_tokens` tokens, and return what cancels it: its place is free at the next
        token. Raises InputError, or fails the reply with it.

        The chunks are those of `TextChunk`: of each answer the last has a finish reason, and the very last has the
        usage. The text of a chunk is whole characters; it has nothing of a stop string.
        """

    def load_now(self) -> EngineLoad: ...

    def hangs(self) -> bool:
        """Whether it has answers in progress, and has made no progress for a minute."""

    def close(self) -> None:
        """End it. Answers in progress fail."""


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A request's prompt, as its model takes it."""

    tokens: list[int]
    photos: Mapping[str, Any] = field(default_factory=dict)
    """What else the model takes of photos: tensors, by its parameters' names."""


class PromptReader(Protocol):
    """The tokenizer's side of an engine."""

    def __call__(self, request: Chat | Prompt) -> PromptTokens:
        """A request's prompt; from any thread. Raises InputError."""


class StepEngine(LanguageEngine, Protocol):
    """An engine that steps in Python's process, and so may be given one of its own."""

    def start_tokens(
        self, request: Chat | Prompt, prompt: PromptTokens, most_tokens: int, reply: Reply[TextChunk]
    ) -> Cancel:
        """As `start`, of a request whose prompt has been read."""

    def after_steps(self, call: Callable[[], None]) -> None:
        """From now on, call `call` after each step, in the thread that steps: once what the step gave is in the
        replies, and before the next one.
        """


ALWAYS = frozenset(
    {"messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "seed"}
)
"""The fields that every engine honours."""
