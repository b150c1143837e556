"""The engine `transformers`: any language model of the hub, as transformers computes it.

It batches continuously. A model that sees photos, one with a draft model, and one that transformers cannot batch so are
computed by `generate`, a few answers at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from torchserve_dag.runtime.handler import EngineLoad, Reply
from torchserve_dag.runtime.messages import Chat, InputError, Prompt, TextChunk
from torchserve_dag.runtime.models.language.counted import CountedPrompts
from torchserve_dag.runtime.models.language.engine import Cancel, PromptTokens
from torchserve_dag.runtime.models.language.settings import LanguageSettings
from torchserve_dag.runtime.models.language.transformers.answer_tokens import AnswerTokens
from torchserve_dag.runtime.models.language.transformers.batch import ContinuousBatch, SettingError
from torchserve_dag.runtime.models.language.transformers.generate import GenerateThreads
from torchserve_dag.runtime.models.language.transformers.model import HubModel
from torchserve_dag.runtime.models.language.transformers.sampler import Sampler
from torchserve_dag.runtime.models.language.writer import AnswerWriter

if TYPE_CHECKING:  # it imports torch
    from torchserve_dag.runtime.compute.placement import Placement

logger = logging.getLogger(__name__)

SUPPORTS = frozenset(
    {"n", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "echo", "tools"}
    | {"tool_choice", "parallel_tool_calls"}
)
STUCK_S = 60.0

Batches = dict[str | None, ContinuousBatch | GenerateThreads]
"""By the name of a LoRA adapter, and None for the model itself."""


def load(folder: Path, settings: LanguageSettings, placement: Placement) -> TransformersEngine:
    """The model of `settings`, ready. Raises ValueError, OSError for a model that cannot be read."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model = HubModel(folder, settings, placement)
    return TransformersEngine(model, settings, _batches(model, settings))


def _batches(model: HubModel, settings: LanguageSettings) -> Batches:
    models = {None: model.model} | {name: model.with_adapter(path) for name, path in settings.adapters.items()}
    if settings.draft or model.sees_photos:
        draft = model.draft(settings.draft) if settings.draft else None
        return {
            name: GenerateThreads(each, settings.room, draft, settings.draft_tokens) for name, each in models.items()
        }
    batches: Batches = {}
    for name, each in models.items():
        try:
            batches[name] = ContinuousBatch(each, settings, model.context, settings.cache_gb * 1e9 / len(models))
        except SettingError:
            raise
        except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            logger.warning("%s is not batched continuously, but answered one by one: %s", settings.model, error)
            batches[name] = GenerateThreads(each, settings.room)
    return batches


class TransformersEngine:
    """A loaded model; see StepEngine."""

    def __init__(self, model: HubModel, settings: LanguageSettings, batches: Batches) -> None:
        self.room = min(getattr(batch, "room", settings.room) for batch in batches.values())
        self.context = model.context
        self.supports = (
            SUPPORTS | ({"photos"} if model.sees_photos else set()) | ({"adapter"} if settings.adapters else set())
        )
        self._model, self._batches = model, batches
        self._served_by = f"transformers {settings.model}"
        self._prompts = CountedPrompts(model.prompts)
        self._seen: dict[str | None, tuple[int | None, float]] = {}

    def count(self, request: Chat | Prompt) -> int:
        return self._prompts.count(request)

    def start(self, request: Chat | Prompt, most_tokens: int, reply: Reply[TextChunk]) -> Cancel:
        return self.start_tokens(request, self._prompts.take(request), most_tokens, reply)

    def after_steps(self, call: Callable[[], None]) -> None:
        for batch in self._batches.values():
            batch.after_step = call

    def start_tokens(
        self, request: Chat | Prompt, prompt: PromptTokens, most_tokens: int, reply: Reply[TextChunk]
    ) -> Cancel:
        """See StepEngine."""
        batch = self._batches.get(request.adapter)
        if batch is None:
            names = ", ".join(sorted(filter(None, self._batches)))
            raise InputError(f"adapter: there is no adapter {request.adapter}; there are {names}.")
        if isinstance(request, Chat) and request.tool_choice not in {None, "auto", "none"}:
            raise InputError("tool_choice: the engine transformers knows auto and none.")
        tools = isinstance(request, Chat) and bool(request.tools)
        decode = self._model.decode_with_marks if tools else self._model.decode
        answers = AnswerWriter(reply, request, len(prompt.tokens), self._served_by)
        writers = []
        for index in range(request.n or 1):
            sampler = Sampler(request, index, self._model.sampling, self._model.vocabulary)
            writers.append(AnswerTokens(answers, index, sampler, decode, self._model.ends, most_tokens))
        if isinstance(batch, ContinuousBatch):
            return batch.start(prompt.tokens, writers)
        return batch.start(prompt, writers)

    def load_now(self) -> EngineLoad:
        loads = [batch.load_now() for batch in self._batches.values()]
        caches = [load.cache_usage for load in loads if load.cache_usage is not None]
        usage = sum(caches) / len(caches) if caches else None
        return EngineLoad(sum(load.running for load in loads), sum(load.waiting for load in loads), usage)

    def hangs(self) -> bool:
        now = time.monotonic()
        for name, batch in self._batches.items():
            steps = batch.progress()
            before, since = self._seen.get(name, (None, now))
            if steps is None or steps != before:
                since = now
            self._seen[name] = steps, since
            if steps == -1 or now - since > STUCK_S:
                return True
        return False

    def close(self) -> None:
        for batch in self._batches.values():
            batch.close()
