"""The interface of a language model's engine: chats and prompts in, chunks of text out.

An adapter is one module of this folder. It starts requests in the engine's own continuous batch, and writes what the
engine gives as chunks. It schedules nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

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
        token. Raises InputError.

        The chunks are those of `TextChunk`: of each answer the last has a finish reason, and the very last has the
        usage. The text of a chunk is whole characters; it has nothing of a stop string.
        """

    def load_now(self) -> EngineLoad: ...

    def hangs(self) -> bool:
        """Whether it has answers in progress, and has made no progress for a minute."""

    def close(self) -> None:
        """End it. Answers in progress fail."""


ALWAYS = frozenset(
    {"messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "seed"}
)
"""The fields that every engine honours."""
