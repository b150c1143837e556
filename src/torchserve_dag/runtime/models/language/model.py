"""A language model as a handler has it: what its engine cannot do is refused, and tokens bound what is in flight."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchserve_dag.runtime.handler import EngineLoad, Reply
from torchserve_dag.runtime.messages import Chat, InputError, Prompt, TextChunk
from torchserve_dag.runtime.models.language.engine import ALWAYS, Cancel, LanguageEngine
from torchserve_dag.runtime.models.language.engines import engine_for, load_engine
from torchserve_dag.runtime.models.language.settings import LanguageSettings

if TYPE_CHECKING:  # it imports torch
    from torchserve_dag.runtime.compute.placement import Placement


OF_OTHERS = 8
"""One client leaves one in so many of the tokens in flight to others."""

CHARACTERS_A_TOKEN = 64
"""More than the tokens of any text have on average. A longer text is not even tokenized, which would take seconds."""


IN_FLIGHT = 4
"""By default, so many times the tokens that fit into the engine may be in flight: in it, or waiting for a place."""


class LanguageModel:
    """A loaded language model, whichever engine computes it."""

    def __init__(self, engine: LanguageEngine, settings: LanguageSettings) -> None:
        self.engine = engine
        self._settings = settings
        self._budget = TokenBudget(settings.tokens_in_flight or IN_FLIGHT * engine.room * engine.context)
        self._prompts: dict[int, int] = {}
        """Of each request that has reserved its tokens, by its id: those of its prompt."""

    @classmethod
    def load(cls, folder: Path, settings: LanguageSettings, placement: Placement) -> LanguageModel:
        """Load the model below `folder` in the engine that the settings name. Raises ValueError, ImportError."""
        settings = replace(settings, engine=engine_for(settings, placement))
        return cls(load_engine(folder, settings, placement), settings)

    @property
    def room(self) -> int:
        """How many answers may be in progress."""
        return self.engine.room

    def reserve(self, request: Chat | Prompt, client: str | None = None) -> Callable[[], None]:
        """Count a request's tokens, until what is returned is called; see ContinuousHandler.reserve.

        Raises InputError for a request that the model cannot serve, and, with 429, where too many are in flight.
        """
        prompt, most = self._measured(request)
        release = self._budget.reserve(prompt + (request.n or 1) * most, client)
        self._prompts[id(request)] = prompt

        def forget_and_release() -> None:
            self._prompts.pop(id(request), None)
            release()

        return forget_and_release

    def start(self, request: Chat | Prompt, reply: Reply[TextChunk]) -> Cancel:
        """Start an answer; see ContinuousHandler.start."""
        _, most = self._measured(request)
        if self._settings.served_as:
            reply = _NamedReply(reply, self._settings.served_as)
        return self.engine.start(self._with_defaults(request), most, reply)

    def _measured(self, request: Chat | Prompt) -> tuple[int, int]:
        """The tokens of a request's prompt, and the limit of its answer. Raises InputError; 413 for one too long."""
        prompt = self._prompts.get(id(request))
        if prompt is None:
            check_supported(request, self.engine.supports, self._settings.engine)
            self._check_length(request)
            prompt = self.engine.count(request)
        left = self.engine.context - prompt
        if left < 1:
            message = (
                f"The prompt has {prompt:,} tokens; the model's context holds {self.engine.context:,}: shorten it."
            )
            raise InputError(message, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        return prompt, min(left, request.most_tokens or self._settings.max_tokens)

    def _with_defaults(self, request: Chat | Prompt) -> Chat | Prompt:
        """The request, with the settings' temperature and top_p where it has none."""
        own = {"temperature": self._settings.temperature, "top_p": self._settings.top_p}
        missing: dict[str, Any] = {
            name: value for name, value in own.items() if value is not None and getattr(request, name) is None
        }
        return replace(request, **missing) if missing else request

    def _check_length(self, request: Chat | Prompt) -> None:
        """Raises InputError for a text that need not be tokenized to be known as too long."""
        texts = [request.prompt] if isinstance(request, Prompt) else [message.text for message in request.messages]
        characters, most = sum(map(len, texts)), CHARACTERS_A_TOKEN * self.engine.context
        if characters > most:
            message = f"The prompt has {characters:,} characters; the model's context of {self.engine.context:,} tokens"
            message += f" holds at most {most:,}: shorten it."
            raise InputError(message, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)

    def load_now(self) -> EngineLoad:
        return replace(self.engine.load_now(), engine=self._settings.engine)

    def hangs(self) -> bool:
        return self.engine.hangs()

    def close(self) -> None:
        self.engine.close()


class _NamedReply:
    """A reply whose chunks name the model as the settings do."""

    def __init__(self, reply: Reply[TextChunk], name: str) -> None:
        self._reply, self._name = reply, name
        self.end, self.fail = reply.end, reply.fail

    def chunk(self, chunk: TextChunk) -> None:
        self._reply.chunk(replace(chunk, served_by=self._name) if chunk.served_by else chunk)


def check_supported(request: Chat | Prompt, supports: frozenset[str], engine: str) -> None:
    """Raises InputError, which names the first field that the engine does not honour."""
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        if value is None or value is False or field.name in ALWAYS or field.name in supports:
            continue
        if _says_nothing(field.name, value):
            continue
        raise InputError(f"{field.name}: the engine {engine} cannot do that; leave it out, or serve another engine.")
    photos = isinstance(request, Chat) and any(
        part.image_url for message in request.messages if isinstance(message.content, list) for part in message.content
    )
    if photos and "photos" not in supports:
        raise InputError(f"messages: this model of the engine {engine} sees no photos; send text.")


def _says_nothing(name: str, value: object) -> bool:
    """Whether a field says what holds anyway."""
    if name == "response_format":
        return getattr(value, "type", None) == "text"
    if name in NEUTRAL:
        return bool(value == NEUTRAL[name])
    return name in {"logit_bias", "tools", "parallel_tool_calls", "logprobs", "top_logprobs"} and not value


NEUTRAL: dict[str, object] = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "tool_choice": "none"}
"""The values that say what holds anyway."""


class TokenBudget:
    """The tokens of the requests in flight: of each, its prompt and the limit of its answer.

    One client leaves an eighth of them to others.
    """

    def __init__(self, most: int) -> None:
        self._most, self._used = most, 0
        self._of_client: Counter[str] = Counter()
        self._lock = threading.Lock()

    def reserve(self, tokens: int, client: str | None = None) -> Callable[[], None]:
        """Count tokens until what is returned is called. Raises BusyError if there are too many, unless none are."""
        share = self._most - self._most // OF_OTHERS
        with self._lock:
            if self._used + tokens > self._most and self._used:
                raise BusyError(_too_many(f"{self._used:,} of {self._most:,} tokens are in flight", tokens))
            used = self._of_client[client] if client else 0
            if used + tokens > share and used:
                in_flight = f"{used:,} of the {share:,} tokens that one client may have are in flight"
                raise BusyError(_too_many(in_flight, tokens))
            self._count(tokens, client)
        reserved = [tokens]

        def release() -> None:
            with self._lock:
                self._count(-reserved.pop() if reserved else 0, client)

        return release

    def _count(self, tokens: int, client: str | None) -> None:
        self._used += tokens
        if client:
            self._of_client[client] += tokens
            if not self._of_client[client]:
                del self._of_client[client]


def _too_many(in_flight: str, tokens: int) -> str:
    needed = f"{in_flight}, and this request needs {tokens:,}"
    return f"{needed}; try again in a second, or ask for a shorter answer with max_tokens."


class BusyError(InputError):
    """There are as many tokens in flight as there may be: 429."""

    type = "Overloaded"

    def __init__(self, message: str) -> None:
        super().__init__(message, HTTPStatus.TOO_MANY_REQUESTS)
