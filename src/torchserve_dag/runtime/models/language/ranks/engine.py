"""An engine of several processes that compute one model together, from the worker's side.

One answer is written at a time. The ranks are watched: if one of them ends, or no token comes in time, the answer in
progress fails, all ranks are ended, and are started again.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from torchserve_dag.runtime.compat.process import ProcessError, ProcessTooSlowError
from torchserve_dag.runtime.compute.cores import cores
from torchserve_dag.runtime.handler import EngineLoad, Reply
from torchserve_dag.runtime.messages import Chat, InputError, OverloadedError, Prompt, TextChunk
from torchserve_dag.runtime.models.handler_process import PAUSES_S, REFUSE_AFTER
from torchserve_dag.runtime.models.language.answer import BY_WRITER, WAITING, EngineAnswer, drawing
from torchserve_dag.runtime.models.language.engine import Cancel
from torchserve_dag.runtime.models.language.engine_errors import EngineEndedError, EngineTimeoutError
from torchserve_dag.runtime.models.language.hub_folder import hub_config, hub_context, hub_folder, refuse_settings
from torchserve_dag.runtime.models.language.ranks.processes import Ranks
from torchserve_dag.runtime.models.language.ranks.rank import Job, RankSpec
from torchserve_dag.runtime.models.language.settings import LanguageSettings
from torchserve_dag.runtime.models.language.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torchserve_dag.runtime.compute.placement import Placement

logger = logging.getLogger(__name__)

SEEDS = 1 << 63


@dataclass(frozen=True, slots=True)
class RankOptions:
    """`options:` of the engines whose model is computed by several processes."""

    ranks: int = 2
    """How many processes compute the model; on GPUs each has one."""
    token_s: float = 60.0
    """The longest wait for the next token, and for the first."""
    start_s: float = 600.0
    """The longest wait until the ranks have loaded the model."""

    def __post_init__(self) -> None:
        if not 1 <= self.ranks <= 64:  # noqa: PLR2004
            raise ValueError(f"options: ranks is {self.ranks}; write 1 to 64")
        if min(self.token_s, self.start_s) <= 0:
            raise ValueError("options: token_s and start_s are above 0")


def load_ranks(
    program: str,
    folder: Path,
    settings: LanguageSettings,
    placement: Placement,
    check: Callable[[Path, int], None],
) -> RankedEngine:
    """Start the ranks of an engine, and wait until they have loaded the model. Raises ValueError.

    `check` raises it for a model's folder, and a number of ranks, that do not go together.
    """
    refuse_settings(settings, "adapters", "draft")
    try:
        options = RankOptions(**settings.options)
    except TypeError:
        raise ValueError(f"options: the engine {settings.engine} knows ranks, token_s and start_s") from None
    model = hub_folder(folder, settings)
    check(model, options.ranks)
    device = placement.device.type
    if device == "cuda" and torch.cuda.device_count() < options.ranks:
        raise ValueError(f"options: ranks is {options.ranks}, and there are {torch.cuda.device_count()} GPUs")
    dtype = "float32" if settings.exact else "bfloat16" if placement.precision == "bfloat16" else None
    threads = settings.threads or max(1, cores() // options.ranks)
    limit = 2 * max(options.token_s, options.start_s)
    base = RankSpec(program, str(model), 0, options.ranks, "", device, dtype, threads, settings.prefill_tokens, limit)
    template = folder / settings.chat_template if settings.chat_template else None
    context = hub_context(model, settings)
    engine = RankedEngine(base, options, Tokenizer(model, context, template), context, settings.engine)
    engine.wait()
    return engine


class RankedEngine:
    """A LanguageEngine whose ranks live as long as this object, one generation of processes after another."""

    supports = BY_WRITER | {"logit_bias"}
    room = 1

    def __init__(self, spec: RankSpec, options: RankOptions, tokenizer: Tokenizer, context: int, name: str) -> None:
        self.context = context
        self._spec, self._options, self._tokenizer = spec, options, tokenizer
        self._name = f"{name}/{Path(spec.model).name}"
        self._vocabulary: int = hub_config(Path(spec.model))["vocab_size"]
        self._changed = threading.Condition()
        self._queue: deque[EngineAnswer] = deque()
        self._now: EngineAnswer | None = None
        self._ranks: Ranks | None = None
        self._refusal: str | None = None
        """Why no answers are accepted."""
        self._loaded = self._closed = False
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.settimeout(0)
        # A process ends with the thread that starts it, so this one lives as long as the engine.
        self._thread = threading.Thread(target=self._keep, name=f"{self._name} ranks", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the model is loaded. Raises ValueError if it cannot be."""
        with self._changed:
            self._changed.wait_for(lambda: self._loaded or self._refusal)
            if not self._loaded:
                raise ValueError(f"{self._name}: {self._refusal}")

    def count(self, request: Chat | Prompt) -> int:
        return len(self._tokenizer(request))

    def start(self, request: Chat | Prompt, most_tokens: int, reply: Reply[TextChunk]) -> Cancel:
        last = max(map(int, request.logit_bias or {}), default=0)
        if last >= self._vocabulary:  # it would end a rank
            raise InputError(f"logit_bias: the model has no token {last}; its last is {self._vocabulary - 1}.")
        answer = EngineAnswer(request, most_tokens, reply, self._tokenizer, self._name)
        with self._changed:
            if self._refusal or len(self._queue) >= WAITING:
                raise OverloadedError(self._refusal or f"{len(self._queue)} answers wait already; try again later.")
            self._queue.append(answer)
        self._poke()
        return lambda: self._cancel(answer)

    def load_now(self) -> EngineLoad:
        return EngineLoad(int(self._now is not None), len(self._queue))

    def hangs(self) -> bool:
        """Never while the ranks are watched: an answer without progress is ended by its own limit."""
        return not self._closed and not self._thread.is_alive()

    def close(self) -> None:
        with self._changed:
            self._closed, self._refusal = True, "The model is closed."
            ranks = self._ranks
        self._poke()
        if ranks:
            ranks.interrupt()
        if self._thread is not threading.current_thread():
            self._thread.join(10)

    def _cancel(self, answer: EngineAnswer) -> None:
        answer.cancelled = True
        with self._changed:
            waits = answer in self._queue
            if waits:
                self._queue.remove(answer)
        if waits:
            answer.finish("stop")
        else:
            self._poke()

    def _poke(self) -> None:
        with contextlib.suppress(OSError):  # it is full: then the thread is about to wake; or it is closed
            self._wake.send(b"\0")

    # The thread that keeps the ranks alive.

    def _keep(self) -> None:
        failed = 0
        try:
            while not self._closed:
                try:
                    with Ranks(self._spec, self._name) as ranks:
                        self._begin(ranks)
                        while self._write_next(ranks):
                            failed = 0
                except Exception as error:  # noqa: BLE001 (whatever happens, answers must not wait for ever)
                    failed += 1
                    if not self._loaded:
                        self._refusal = str(error)
                        return
                    self._recover(error, failed)
        finally:
            with self._changed:
                self._refusal = self._refusal or "The model is closed."
                self._changed.notify_all()
            self._fail_waiting(OverloadedError(self._refusal))

    def _begin(self, ranks: Ranks) -> None:
        with self._changed:
            self._ranks = ranks
        if self._closed:
            return
        ranks.loaded(self._options.start_s)
        with self._changed:
            self._loaded = True
            if not self._closed:
                self._refusal = None
            self._changed.notify_all()

    def _recover(self, error: Exception, failed: int) -> None:
        """Fail the answer in progress, and wait before the next start."""
        if self._closed:
            self._fail_now(OverloadedError("The model is closed."))
            return
        logger.warning("%s: %s; the ranks are started again", self._name, error)
        again = "the processes that compute it are being started again. Try again."
        if isinstance(error, ProcessTooSlowError):
            what = f"The model gave no token within {self._options.token_s:g} s: {again}"
            self._fail_now(EngineTimeoutError(what))
        else:
            what = f"A process of the model ended while it wrote this answer: {again}"
            self._fail_now(EngineEndedError(what))
        if failed >= REFUSE_AFTER:
            self._refusal = "The model's processes end again and again; they are started again after a pause."
            self._fail_waiting(OverloadedError(self._refusal))
        with self._changed:
            self._changed.wait_for(lambda: self._closed, PAUSES_S[min(failed, len(PAUSES_S)) - 1])

    def _fail_now(self, error: InputError) -> None:
        answer, self._now = self._now, None
        if answer:
            answer.fail(error)

    def _fail_waiting(self, error: InputError) -> None:
        with self._changed:
            answers = list(self._queue)
            self._queue.clear()
        for answer in answers:
            answer.fail(error)

    def _write_next(self, ranks: Ranks) -> bool:
        """Write the next answer; False where the engine is closed. Raises ProcessError."""
        while not self._closed:
            with self._changed:
                answer = self._now = self._queue.popleft() if self._queue else None
            if answer:
                self._write(ranks, answer)
                self._now = None
                return True
            ranks.idle(self._woken)
        return False

    def _write(self, ranks: Ranks, answer: EngineAnswer) -> None:
        ranks.ask(_job(answer))
        asked = False
        end = time.monotonic() + self._options.token_s
        while True:
            if answer.cancelled and not asked:
                ranks.cancel()
                asked = True
            message = ranks.message(end, self._woken)
            if isinstance(message, int):
                end = time.monotonic() + self._options.token_s
                answer.add(message)
            elif message:
                answer.finish("length" if message == "length" else "stop")
                return
            elif self._closed:
                raise ProcessError("it is closed")


def _job(answer: EngineAnswer) -> Job:
    """An answer as the ranks get it: its sampling, as arguments of transformers' `generate`."""
    request = answer.request
    chosen = drawing(request)
    if request.logit_bias:
        chosen["sequence_bias"] = [[[int(token)], bias] for token, bias in request.logit_bias.items()]
    seed = secrets.randbits(63) if request.seed is None else request.seed % SEEDS
    return Job(answer.prompt, answer.most, seed, chosen)
