"""Answers in transformers' own continuous batch."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from torchserve_dag.runtime.handler import EngineLoad
from torchserve_dag.runtime.models.language.engine import Cancel
from torchserve_dag.runtime.models.language.settings import LanguageSettings
from torchserve_dag.runtime.models.language.transformers.answer_tokens import AnswerTokens
from torchserve_dag.runtime.models.language.transformers.model import greedy
from torchserve_dag.runtime.models.language.transformers.sampler import Sampler

PAGE = 16
"""Tokens of a page of the cache. Prompts share whole pages."""
TRIAL_S = 120.0
"""The longest wait for the first tokens of a model that has just been loaded."""
CLOSE_S = 10.0
"""The longest wait for the last step when the engine is closed."""


class SettingError(ValueError):
    """A setting does not fit; another one would."""


class ContinuousBatch:
    """Keeps a model's continuous batch going, in the manager's thread, which also writes what it gives.

    The manager has one generation config for all its requests. So it is set to take the most probable token, and each
    row's choice is made the most probable one by its own request's `Sampler`.
    """

    def __init__(self, model: Any, settings: LanguageSettings, context: int, cache_bytes: float) -> None:
        """Raises SettingError where the cache cannot hold one full context, any other error if the model cannot
        be batched so.
        """
        import transformers  # noqa: PLC0415 (only this engine needs it)

        pages = _pages(model, settings, context, cache_bytes)
        options = {
            "page_size": PAGE, "num_blocks": pages, "max_batch_tokens": settings.prefill_tokens + settings.room,
            "max_requests_per_batch": settings.room, "allow_block_sharing": settings.prefix_cache,
            "use_async_batching": False, "use_cuda_graph": False,  # each row's choice is made by code, in every step
            "auto_switch_to_flash": model.device.type == "cuda",
        }  # fmt: skip
        try:
            config = transformers.ContinuousBatchingConfig(**options | settings.options)
        except TypeError as error:
            raise SettingError(f"options: transformers' ContinuousBatchingConfig does not have them: {error}") from None
        self._manager = model.init_continuous_batching(greedy(eos_token_id=-1), config)
        self._choices = self._manager.logit_processor = _Choices()
        self._manager.warmup()  # makes the cache
        self._cached = _count_cached(self._manager.batch_processor.cache)
        self.after_step: Callable[[], None] = _nothing
        """Called after each step that gave something, in the manager's thread."""
        self._answers: dict[str, AnswerTokens] = {}
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._manager.start()
        try:
            self._try_out()
        except BaseException:
            self.close()
            raise

    def start(self, tokens: list[int], answers: Sequence[AnswerTokens]) -> Cancel:
        """Start answers to one prompt. Returns what cancels them."""
        if not self._manager.is_running():
            raise RuntimeError("transformers' continuous batch has ended; the log says why")
        named = {f"answer-{next(self._ids)}": answer for answer in answers}
        for name, answer in named.items():
            self._add(tokens, name, answer)
        return lambda: self._cancel(named)

    def load_now(self) -> EngineLoad:
        processor = self._manager.batch_processor
        waiting = len(processor.scheduler.waiting_requests) + self._manager.input_queue.qsize()
        return EngineLoad(
            len(processor.scheduler.active_requests), waiting, 1.0 - processor.cache.compute_free_capacity()
        )

    def progress(self) -> int | None:
        """A number that grows with each step; None with nothing to do, -1 where the manager has ended."""
        if not self._manager.is_running():
            return -1
        return getattr(self._manager, "current_batch", 0) if self._answers else None

    def close(self) -> None:
        self._manager.stop(block=True, timeout=CLOSE_S, hard_stop=True)
        for name in list(self._answers):
            self._fail(name, RuntimeError("the engine was closed"))

    def _add(self, tokens: list[int], name: str, answer: AnswerTokens) -> None:
        with self._lock:
            self._answers[name] = answer
            if answer.sampler.changes:
                self._choices.samplers[name] = answer.sampler
        added = self._manager.add_request(
            tokens,
            request_id=name,
            max_new_tokens=answer.most_tokens,
            streaming=True,
            eos_token_id=sorted(answer.ends),
        )
        if added is None:
            self._fail(name, RuntimeError("transformers' continuous batch has ended; the log says why"))

    def _take_all(self, outputs: Sequence[Any]) -> None:
        """What a step gave, in the manager's thread. Its own way, by an event loop, would take a second thread, which
        waits for Python's lock while the next step computes.
        """
        for output in outputs:
            self._write(output)
        self.after_step()

    def _take(self, output: Any) -> None:
        self._take_all([output])

    def _write(self, output: Any) -> None:
        name = output.request_id
        answer = self._answers.get(name)
        if answer is None:
            return
        if output.error is not None:
            self._fail(name, RuntimeError(output.error))
            return
        answer.cached_tokens = self._cached.get(name, 0)
        if not answer.take(output.generated_tokens[answer.count :]):
            self._forget(name)
            if not output.is_finished():
                self._manager.cancel_request(name)

    def _cancel(self, named: Iterable[str]) -> None:
        for name in named:
            if name in self._answers:
                self._manager.cancel_request(name)
                self._fail(name, asyncio.CancelledError())

    def _forget(self, name: str) -> AnswerTokens | None:
        """The answer, which is not in progress any more; None if it was not."""
        with self._lock:
            self._choices.samplers.pop(name, None)
            self._cached.pop(name, None)
            return self._answers.pop(name, None)

    def _fail(self, name: str, error: BaseException) -> None:
        if answer := self._forget(name):
            answer.fail(error)

    def _try_out(self) -> None:
        """One step, so that a model that cannot be batched fails while it is loaded. Raises ValueError."""
        outputs: SimpleQueue[Any] = SimpleQueue()
        router = self._manager.output_router
        router.deliver, router.deliver_batch = outputs.put, lambda batch: outputs.put(batch[0])
        self._manager.add_request([0, 0], request_id="trial", max_new_tokens=1)
        try:
            error = outputs.get(timeout=TRIAL_S).error
        except Empty:
            error = f"there was no token after {TRIAL_S:g} s"
        if error is not None:
            raise ValueError(error)
        router.deliver, router.deliver_batch = self._take, self._take_all


def _nothing() -> None:
    """Nobody is told."""


class _Choices:
    """Stands where the manager has its processors of logits: makes each request's choice the most probable token."""

    do_processing = True
    tensors_required = 0

    def __init__(self) -> None:
        self.samplers: dict[str, Sampler] = {}
        self._rows: list[tuple[int, Sampler, Any]] = []

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Nothing is passed by name."""

    def fill_defaults(self, tensors: Tensor) -> None:
        """It takes no tensors."""

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: Tensor) -> Tensor:
        """Called before a step: notes which row of the logits is of which request."""
        states = [request.state for request in requests_in_batch if request.has_new_token]
        pairs = [(row, self.samplers.get(state.request_id), state) for row, state in enumerate(states)]
        self._rows = [(row, sampler, state) for row, sampler, state in pairs if sampler is not None]
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, args: Tensor) -> Tensor:  # noqa: ARG002 (transformers' own)
        """`scores`: float32 [row, vocabulary]."""
        for row, sampler, state in self._rows:
            output = state.to_generation_output()
            scores[row, sampler.choose(scores[row], output.generated_tokens)] = torch.inf
        return scores


def _pages(model: Any, settings: LanguageSettings, context: int, cache_bytes: float) -> int:
    """The cache's pages: as many as fit, at most a full context for each answer. Raises SettingError."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    least = -(-context // PAGE) + 1
    pages = min(int(cache_bytes / a_token) // PAGE, settings.room * least)
    if pages < least:
        needed = least * PAGE * a_token / 1e9
        raise SettingError(f"cache_gb: {context:,} tokens of context take {needed:.2g} GB; set more, or less context")
    return pages


def _count_cached(cache: Any) -> dict[str, int]:
    """Has the cache note how many tokens of each request's prompt it had already: its manager does not tell."""
    cached: dict[str, int] = {}
    search = cache.search_prefix_match

    def search_and_note(request_id: str, prompt_ids: list[int]) -> int:
        cached[request_id] = found = search(request_id, prompt_ids)
        return int(found)

    cache.search_prefix_match = search_and_note
    return cached
