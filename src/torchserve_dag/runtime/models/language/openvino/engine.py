"""The engine `openvino`: OpenVINO GenAI's continuous batching, on a CPU. Reads GGUF, and folders of OpenVINO IR.

Its pipeline is stepped by one thread. Others add requests and cancel them; the answers are read between two steps.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.compute.cores import cores
from torchserve_dag.runtime.handler import EngineLoad, Reply
from torchserve_dag.runtime.messages import Chat, FinishReason, InputError, Prompt, TextChunk, TokenLogprob
from torchserve_dag.runtime.models.language.counted import CountedPrompts
from torchserve_dag.runtime.models.language.engine import Cancel, PromptTokens, StepEngine
from torchserve_dag.runtime.models.language.openvino.by_adapter import EngineByAdapter
from torchserve_dag.runtime.models.language.openvino.generation_config import SUPPORTS, configure
from torchserve_dag.runtime.models.language.openvino.lora import read_adapter
from torchserve_dag.runtime.models.language.openvino.prompts import OpenVinoPrompts, as_tensor, last_line
from torchserve_dag.runtime.models.language.openvino.vocabulary import ByteDetokenizer, Vocabulary, detokenizers
from torchserve_dag.runtime.models.language.settings import LanguageSettings
from torchserve_dag.runtime.models.language.writer import AnswerWriter, Detokenizer

if TYPE_CHECKING:  # it imports torch
    from torchserve_dag.runtime.compute.placement import Placement

logger = logging.getLogger(__name__)

MOST_CONTEXT = 8192
"""The default limit of a context, in tokens."""
HANGS_S = 60.0
JOIN_S = 10.0


def load(folder: Path, settings: LanguageSettings, placement: Placement | None) -> StepEngine:  # noqa: ARG001 (a CPU's engine)
    """Raises ValueError for a model that is not there, or cannot be read."""
    if not settings.adapters:
        return OpenVinoEngine(folder, settings)
    return EngineByAdapter(lambda name: OpenVinoEngine(folder, settings, name), settings.adapters)


@dataclass(eq=False, slots=True)
class _Answer:
    """One answer in progress."""

    handle: Any
    prompt: bytes
    """Its tokens."""
    answers: AnswerWriter
    index: int
    detokenizer: ByteDetokenizer | Detokenizer
    wants_logprobs: bool
    tokens: int = 0
    cancelled: bool = False


class OpenVinoEngine:
    """See LanguageEngine."""

    supports = SUPPORTS

    def __init__(self, folder: Path, settings: LanguageSettings, adapter: str | None = None) -> None:
        """`adapter`: the name of the LoRA adapter that all its answers are written with."""
        self._path, self._settings = folder / settings.model, settings
        if not self._path.exists():
            raise ValueError(f"there is no {settings.model} in {folder}")
        self._adapter = None if adapter is None else read_adapter(folder, settings, adapter)
        self._draft = None if settings.draft is None else _draft(folder, settings.draft)
        # With both, 2026.4.1 raises in a step: it looks for tokens that were drafted and not confirmed.
        self._prefix_cache = settings.prefix_cache and self._draft is None
        self.room = settings.room
        self._load()
        tokenizer = self._tokenizer
        self._prompts = CountedPrompts(OpenVinoPrompts(tokenizer, folder, settings))
        self._detokenizer = detokenizers(Vocabulary.of(tokenizer), self._encoded, tokenizer.decode)
        cut = len(self._encoded("a b " * MOST_CONTEXT))  # a tokenizer cuts what is longer than its model's context
        self.context = min(settings.context or MOST_CONTEXT, cut)
        self._served_by = f"openvino {Path(settings.model).stem}"
        self._after_step: Callable[[], None] = _nothing
        self._changed = threading.Condition()
        self._starting: list[_Start] = []
        self._running: list[_Answer] = []
        self._requests = 0
        self.steps = 0
        """Steps so far: each computes a token of every answer, and a part of the prompts that wait."""
        self._closed = self._lost = False
        """`_lost`: its pipeline raised, and could not be made anew: only another process helps."""
        self._stepped = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="openvino-steps", daemon=True)
        self._thread.start()

    def count(self, request: Chat | Prompt) -> int:
        return self._prompts.count(request)

    def start(self, request: Chat | Prompt, most_tokens: int, reply: Reply[TextChunk]) -> Cancel:
        return self.start_tokens(request, self._prompts.take(request), most_tokens, reply)

    def after_steps(self, call: Callable[[], None]) -> None:
        self._after_step = call

    def start_tokens(
        self, request: Chat | Prompt, prompt: PromptTokens, most_tokens: int, reply: Reply[TextChunk]
    ) -> Cancel:
        """See StepEngine."""
        config = self._pipeline.get_config()
        configure(config, request, most_tokens, self._settings.draft_tokens if self._draft else None)
        answers = AnswerWriter(reply, request, len(prompt.tokens), self._served_by)
        start = _Start(request, as_tensor(prompt), config, answers, request.n or 1)
        with self._changed:
            if self._closed:
                raise InputError("The model is closing.", HTTPStatus.SERVICE_UNAVAILABLE)
            self._starting.append(start)
            self._changed.notify()
        return start.cancel

    def load_now(self) -> EngineLoad:
        with self._changed:
            running, waiting = len(self._running), sum(start.count for start in self._starting)
        return EngineLoad(min(running, self.room), waiting + max(0, running - self.room), self._cache_usage / 100)

    def hangs(self) -> bool:
        return self._lost or (bool(self._running) and time.monotonic() - self._stepped > HANGS_S)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_S)

    # Loading, and what a request asks for.

    def _load(self) -> None:
        """Load the pipeline; again, after it has raised in a step, for it does not go on then."""
        import openvino_genai  # noqa: PLC0415 (only this engine needs it)

        settings = self._settings
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = max(1, round(settings.cache_gb))
        scheduler.enable_prefix_caching = self._prefix_cache
        scheduler.max_num_seqs = settings.room
        scheduler.dynamic_split_fuse = True
        scheduler.max_num_batched_tokens = max(settings.prefill_tokens, settings.room)
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": settings.threads or cores(), **settings.options}
        if settings.exact:
            properties |= {
                "EXECUTION_MODE_HINT": "ACCURACY",
                "INFERENCE_PRECISION_HINT": "f32",
                "KV_CACHE_PRECISION": "f32",
            }
        try:
            if self._draft is not None:
                properties["draft_model"] = openvino_genai.draft_model(self._draft, "CPU", **properties)
            if self._adapter is not None:
                properties["adapters"] = self._adapter
            self._pipeline = openvino_genai.ContinuousBatchingPipeline(self._path, scheduler, "CPU", properties)
        except RuntimeError as error:
            raise ValueError(f"OpenVINO cannot read {settings.model}: {last_line(error)}") from None
        self._tokenizer = self._pipeline.get_tokenizer()
        self._cache_usage = 0.0

    def _encoded(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False).input_ids.data[0]]

    # The thread that steps.

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._starting or self._running):
                    self._changed.wait()
                if not self._running:
                    self._stepped = time.monotonic()  # the wait for a request counts for no step
                starting, self._starting = self._starting, []
                if self._closed:
                    break
            try:
                held = [start for start in starting if not self._add(start)]
                with self._changed:
                    self._starting[:0] = held
                starting = []
                self._step()
            except Exception as error:  # noqa: BLE001 (the engine's own, in C++)
                logs.report(logger, error, "OpenVINO raised in a step; its pipeline is made anew")
                with self._changed:
                    running, self._running = self._running, []
                self._fail([*running, *starting], RuntimeError("the engine failed, and starts again"))
                self._reload()
            self._after_step()
        with self._changed:
            starting += self._starting
        self._fail([*self._running, *starting], InputError("The model is closing.", HTTPStatus.SERVICE_UNAVAILABLE))

    def _add(self, start: _Start) -> bool:
        """Add a request to the pipeline. Returns whether it may leave the queue.

        While an answer to a prompt is being written, a longer prompt that begins with that whole prompt waits: the
        prefix cache (2026.4.1) would give it the block that the answer is being written into, and both would be wrong.
        """
        if start.cancelled:
            start.answers.fail(_CANCELLED)
            return True
        prompt = start.ids.data.tobytes()
        written = (answer.prompt for answer in self._running if not answer.cancelled)
        if self._prefix_cache and any(prompt.startswith(each) and each != prompt for each in written):
            return False
        for index in range(start.count):
            seed = start.request.seed
            start.config.rng_seed = random.getrandbits(32) if seed is None else (seed + index) % 2**32
            self._requests += 1
            try:
                handle = self._pipeline.add_request(self._requests, start.ids, start.config)
            except RuntimeError as error:
                start.answers.fail(error)
                return True
            answer = _Answer(handle, prompt, start.answers, index, self._detokenizer(), bool(start.request.logprobs))
            start.running.append(answer)
            with self._changed:
                self._running.append(answer)
                answer.cancelled = start.cancelled  # in the meantime
        return True

    def _step(self) -> None:
        for answer in [answer for answer in self._running if answer.cancelled]:
            self._leave(answer)
            answer.answers.fail(_CANCELLED)
        if not self._pipeline.has_non_finished_requests():
            return  # all that came was cancelled before it was added
        self._pipeline.step()
        self.steps += 1
        self._stepped = time.monotonic()
        self._cache_usage = self._pipeline.get_metrics().cache_usage
        for answer in list(self._running):
            if not answer.cancelled:
                self._read(answer)
        if not self._running and self._pipeline.has_non_finished_requests():
            self._pipeline.step()  # the blocks of what was cancelled are free now

    def _read(self, answer: _Answer) -> None:
        """Write what an answer has got in a step."""
        handle = answer.handle
        while handle.can_read():
            for output in handle.read().values():
                tokens = output.generated_ids
                answer.tokens += len(tokens)
                reason = output.finish_reason.name
                text = answer.detokenizer.add(tokens)
                logprobs = self._logprobs(tokens, output.generated_log_probs) if answer.wants_logprobs else None
                goes_on = answer.answers.write(answer.index, text, logprobs)
                if reason != "NONE" or not goes_on:
                    self._finish(answer, "length" if reason == "LENGTH" else "stop")
                    return
        status = handle.get_status().name
        if status == "IGNORED":  # there is no memory for it
            self._leave(answer)
            message = "The cache of this model is full; try again later, or with a shorter prompt."
            answer.answers.fail(InputError(message, HTTPStatus.SERVICE_UNAVAILABLE))
        elif status == "FINISHED":
            self._finish(answer, "stop")

    def _logprobs(self, tokens: list[int], found: list[float]) -> list[TokenLogprob]:
        return [
            TokenLogprob(self._tokenizer.decode([token], skip_special_tokens=False), logprob)
            for token, logprob in zip(tokens, found, strict=False)
        ]

    def _finish(self, answer: _Answer, reason: FinishReason) -> None:
        self._leave(answer)
        answer.answers.write(answer.index, answer.detokenizer.rest())
        answer.answers.finish(answer.index, reason, answer.tokens)

    def _leave(self, answer: _Answer) -> None:
        answer.handle.cancel()
        with self._changed:
            self._running.remove(answer)

    @staticmethod
    def _fail(those: Sequence[_Answer | _Start], error: BaseException) -> None:
        for one in those:
            one.answers.fail(error)  # of several answers to one request, the first call counts

    def _reload(self) -> None:
        try:
            self._load()
        except ValueError as error:
            logs.report(logger, error, "the model cannot be loaded again")
            with self._changed:
                self._closed = self._lost = True


@dataclass(eq=False, slots=True)
class _Start:
    """A request on its way into the pipeline."""

    request: Chat | Prompt
    ids: Any
    config: Any
    answers: AnswerWriter
    count: int
    running: list[_Answer] = field(default_factory=list)
    cancelled: bool = False

    def cancel(self) -> None:
        """Its answers leave the batch at the next step."""
        self.cancelled = True
        for answer in list(self.running):
            answer.cancelled = True


def _draft(folder: Path, name: str) -> Path:
    """The folder of a draft model. Raises ValueError."""
    for file in ("openvino_model.xml", "openvino_tokenizer.xml"):
        if not (folder / name / file).is_file():
            what = "the engine openvino reads a draft model as a folder of OpenVINO IR, with its tokenizer"
            raise ValueError(f"{what}: there is no {file} in {folder / name}")
    return folder / name


def _nothing() -> None:
    """Nobody is told."""


_CANCELLED = InputError("The request was cancelled.", 499)
