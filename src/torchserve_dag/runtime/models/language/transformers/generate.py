"""Answers one by one, by transformers' `generate`: for models that its continuous batch does not take."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from torchserve_dag.runtime.handler import EngineLoad
from torchserve_dag.runtime.models.language.engine import Cancel, PromptTokens
from torchserve_dag.runtime.models.language.transformers.answer_tokens import AnswerTokens
from torchserve_dag.runtime.models.language.transformers.model import greedy

MOST_THREADS = 4
"""Each answer has a thread of its own; more take each other's time."""


class GenerateThreads:
    """Runs `generate` in a few threads, with a draft model if there is one."""

    def __init__(self, model: Any, threads: int, draft: Any = None, draft_tokens: int = 0) -> None:
        self._model, self._draft = model, draft
        if draft is not None:  # constant, for what it learns it would write into a config that all threads share
            draft.generation_config.num_assistant_tokens = draft_tokens
            draft.generation_config.num_assistant_tokens_schedule = "constant"
            draft.generation_config.assistant_confidence_threshold = 0.0
        self.room = min(threads, MOST_THREADS)
        self._threads = ThreadPoolExecutor(self.room, "transformers-generate")
        self._open: set[_Run] = set()
        self._lock = threading.Lock()
        self._steps = 0
        self.after_step: Callable[[], None] = _nothing
        """Called after each step, in its thread, and after an answer has failed."""

    def start(self, inputs: PromptTokens, answers: Sequence[AnswerTokens]) -> Cancel:
        """Start answers to one prompt. Returns what cancels them."""
        run = _Run(inputs, answers)
        with self._lock:
            self._open.add(run)
        self._threads.submit(self._write, run)
        return lambda: self._end(run, asyncio.CancelledError())

    def load_now(self) -> EngineLoad:
        with self._lock:
            running = sum(run.runs for run in self._open)
            return EngineLoad(running, len(self._open) - running)

    def progress(self) -> int | None:
        """A number that grows with each step; None with nothing to do."""
        return self._steps if self._open else None

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for run in list(self._open):
            self._end(run, RuntimeError("the engine was closed"))

    def _end(self, run: _Run, error: BaseException) -> None:
        """Have a run end at its next token; at once, if it has not begun."""
        with self._lock:
            run.error = run.error or error
            if run.runs or run not in self._open:
                return
            self._open.discard(run)
        run.fail(run.error)

    def _write(self, run: _Run) -> None:
        with self._lock:
            if run not in self._open:
                return
            run.runs = True
        try:
            for answer in run.answers:
                if run.error is None:
                    self._generate(run, answer)
        except Exception as error:  # noqa: BLE001 (it belongs to the request, not to this thread)
            run.error = run.error or error
        finally:
            with self._lock:
                self._open.discard(run)
        if run.error is not None:
            run.fail(run.error)
            self.after_step()

    def _generate(self, run: _Run, answer: AnswerTokens) -> None:
        from transformers import LogitsProcessorList, StoppingCriteriaList  # noqa: PLC0415 (as everything of this engine)

        device = self._model.device
        tokens = torch.tensor([run.inputs.tokens], device=device)
        prompt = len(run.inputs.tokens)

        def choose(input_ids: Tensor, scores: Tensor) -> Tensor:
            scores[0, answer.sampler.choose(scores[0].float(), input_ids[0, prompt:].tolist())] = torch.inf
            return scores

        def stops(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG001 (transformers' own)
            self._steps += 1
            goes_on = answer.take(input_ids[0, prompt + answer.count :].tolist()) and run.error is None
            self.after_step()
            return torch.tensor([not goes_on], device=device)

        config = greedy(max_new_tokens=answer.most_tokens, eos_token_id=sorted(answer.ends) or None, pad_token_id=0)
        self._model.generate(
            tokens, attention_mask=torch.ones_like(tokens), generation_config=config, assistant_model=self._draft,
            stopping_criteria=StoppingCriteriaList([stops]),
            logits_processor=LogitsProcessorList([choose] if answer.sampler.changes else []),
            **{name: value.to(device, self._kind(value)) for name, value in run.inputs.photos.items()},
        )  # fmt: skip
        if not answer.ended and run.error is None:
            raise RuntimeError("transformers' generate ended before its answer did")

    def _kind(self, value: Tensor) -> torch.dtype:
        return self._model.dtype if value.is_floating_point() else value.dtype


class _Run:
    """The answers to one request."""

    def __init__(self, inputs: PromptTokens, answers: Sequence[AnswerTokens]) -> None:
        self.inputs, self.answers = inputs, answers
        self.runs = False
        self.error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        self.answers[0].fail(error)


def _nothing() -> None:
    """Nobody is told."""
