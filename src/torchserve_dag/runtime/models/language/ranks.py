"""An engine of several processes that compute one model together, from the worker's side.

One answer is written at a time. The ranks are watched: if one of them ends, or no token comes in time, the answer in
progress fails, all ranks are ended, and are started again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import select
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchserve_dag.runtime.compat import link
from torchserve_dag.runtime.compat.process import Process, ProcessError, ProcessTooSlowError
from torchserve_dag.runtime.compute.cores import cores
from torchserve_dag.runtime.handler import EngineLoad, Reply
from torchserve_dag.runtime.messages import Chat, FinishReason, InputError, OverloadedError, Prompt, TextChunk
from torchserve_dag.runtime.models.handler_process import PAUSES_S, REFUSE_AFTER
from torchserve_dag.runtime.models.language.engine import Cancel
from torchserve_dag.runtime.models.language.hub_folder import hub_context, hub_folder
from torchserve_dag.runtime.models.language.rank import CANCEL, Job, RankSpec
from torchserve_dag.runtime.models.language.settings import LanguageSettings
from torchserve_dag.runtime.models.language.tokenizer import Tokenizer
from torchserve_dag.runtime.models.language.writer import Answers, Detokenizer

if TYPE_CHECKING:
    from torchserve_dag.runtime.compute.placement import Placement

logger = logging.getLogger(__name__)

PROGRAM = "torchserve_dag.runtime.models.language.rank"
WAITING = 16
"""The most answers that wait for the one in progress; the worker's own queue is before this one."""
_ASK_S = 5.0
"""How long a rank may take to read a request: it waits for one."""


class RankEndedError(InputError):
    """The ranks ended with an answer in progress."""

    type = "WorkerDied"


class TokenTimeoutError(InputError):
    """The next token did not come in time."""

    type = "Timeout"


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
        if not 2 <= self.ranks <= 64:  # noqa: PLR2004
            raise ValueError(f"options: ranks is {self.ranks}; write 2 to 64")
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
    for name in ("adapters", "draft"):
        if getattr(settings, name):
            raise ValueError(f"{name}: the engine {settings.engine} has none")
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
    limit = options.token_s
    base = RankSpec(program, str(model), 0, options.ranks, "", device, dtype, threads, settings.prefill_tokens, limit)
    template = folder / settings.chat_template if settings.chat_template else None
    engine = RankedEngine(base, options, Tokenizer(model, template), hub_context(model, settings), settings.engine)
    engine.wait()
    return engine


class RankedEngine:
    """A LanguageEngine whose ranks live as long as this object, one generation of processes after another."""

    supports = frozenset({"echo", "logit_bias"})
    room = 1

    def __init__(self, spec: RankSpec, options: RankOptions, tokenizer: Tokenizer, context: int, name: str) -> None:
        self.context = context
        self._spec, self._options, self._tokenizer = spec, options, tokenizer
        self._name = f"{name}/{Path(spec.model).name}"
        self._changed = threading.Condition()
        self._queue: deque[_Answer] = deque()
        self._now: _Answer | None = None
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
        tokens = self._tokenizer(request)
        seed = secrets.randbits(63) if request.seed is None else request.seed % (1 << 63)
        job = Job(tokens, most_tokens, seed, sampling(request))
        answer = _Answer(job, Answers(reply, request, len(tokens), self._name), Detokenizer(self._tokenizer.decode))
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

    def _cancel(self, answer: _Answer) -> None:
        answer.cancelled = True
        with self._changed:
            waits = answer in self._queue
            if waits:
                self._queue.remove(answer)
        if waits:
            answer.writer.finish(0, "stop", 0)
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
            self._fail_now(TokenTimeoutError(what, HTTPStatus.GATEWAY_TIMEOUT))
        else:
            what = f"A process of the model ended while it wrote this answer: {again}"
            self._fail_now(RankEndedError(what, HTTPStatus.INSUFFICIENT_STORAGE))  # TorchServe's status
        if failed >= REFUSE_AFTER:
            self._refusal = "The model's processes end again and again; they are started again after a pause."
            self._fail_waiting(OverloadedError(self._refusal))
        with self._changed:
            self._changed.wait_for(lambda: self._closed, PAUSES_S[min(failed, len(PAUSES_S)) - 1])

    def _fail_now(self, error: InputError) -> None:
        answer, self._now = self._now, None
        if answer:
            answer.writer.fail(error)

    def _fail_waiting(self, error: InputError) -> None:
        with self._changed:
            answers = list(self._queue)
            self._queue.clear()
        for answer in answers:
            answer.writer.fail(error)

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

    def _write(self, ranks: Ranks, answer: _Answer) -> None:
        ranks.ask(answer.job)
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
                answer.finish("length" if message == "length" and not answer.cancelled else "stop")
                return
            elif self._closed:
                raise ProcessError("it is closed")


class _Answer:
    """An answer in progress, or one that waits for it."""

    def __init__(self, job: Job, writer: Answers, text: Detokenizer) -> None:
        self.job, self.writer, self._text = job, writer, text
        self._tokens = 0
        self.cancelled = False
        """Whether nobody waits for the rest of it: cancelled, or beyond a stop string."""

    def add(self, token: int) -> None:
        self._tokens += 1
        if not self.cancelled and not self.writer.write(0, self._text.add([token])):
            self.cancelled = True

    def finish(self, reason: FinishReason) -> None:
        self.writer.write(0, self._text.rest())
        self.writer.finish(0, reason, self._tokens)


class Ranks:
    """One generation of processes, which all end with this object."""

    def __init__(self, spec: RankSpec, name: str) -> None:
        self._answered: set[int] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._processes: list[Process] = []
        try:
            for rank in range(spec.ranks):
                settings = asdict(spec) | {"rank": rank, "store": f"{self._folder.name}/store"}
                self._processes.append(Process(f"{name} rank {rank}", None, settings, PROGRAM))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        self._folder.cleanup()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def interrupt(self) -> None:
        """From another thread: let whatever waits for the ranks find them ended."""
        for process in self._processes:
            process.interrupt()

    def loaded(self, within_s: float) -> None:
        """Wait until every rank has loaded its part. Raises ProcessError."""
        end = time.monotonic() + within_s
        self._answered.clear()
        while len(self._answered) < len(self._processes):
            self.message(end)

    def ask(self, job: Job) -> None:
        """Begin an answer. Raises ProcessError."""
        self._answered.clear()
        message = json.dumps(asdict(job)).encode()
        for process in self._processes:
            process.send(link.BATCH, message, _ASK_S)

    def cancel(self) -> None:
        """End the answer in progress at its next token. Raises ProcessError."""
        self._processes[0].send(CANCEL, b"", _ASK_S)

    def message(self, end: float, wake: socket.socket | None = None) -> int | str | None:
        """The answer's next token, or its finish reason once all ranks are ready for the next one; None for neither.

        Raises ProcessError, and ProcessTooSlowError at the time `end`.
        """
        left = max(0.0, end - time.monotonic())
        ready = self._ready(left, wake)
        if ready is None:
            raise ProcessTooSlowError("the ranks took too long")
        for rank in ready:
            kind, message = self._processes[rank].receive(_ASK_S, f"rank {rank} sent half a message")
            if kind == link.FAILED:
                raise ProcessError(message.decode("utf-8", "replace"))
            if kind == link.CHUNK:
                return int(message)
            self._answered.add(rank)
            if rank == 0:
                self._reason = message.decode()
            if len(self._answered) == len(self._processes):
                return self._reason
        return None

    def idle(self, wake: socket.socket) -> None:
        """Wait until `wake` is readable. Raises ProcessError if a rank ends."""
        if self._ready(None, wake):
            self.message(time.monotonic() + _ASK_S)

    def _ready(self, within_s: float | None, wake: socket.socket | None) -> list[int] | None:
        """The ranks that have something to say; None where nothing comes in time."""
        sockets: list[Any] = [*self._processes, *([wake] if wake else [])]
        ready = select.select(sockets, [], [], within_s)[0]
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                wake.recv(1 << 12)  # type: ignore[union-attr]
        return [rank for rank, process in enumerate(self._processes) if process in ready] if ready else None


def sampling(request: Chat | Prompt) -> dict[str, Any]:
    """A request's sampling, as arguments of transformers' `generate`; the rest is the model's generation_config."""
    chosen: dict[str, Any] = {}
    if request.temperature == 0 or request.top_p == 0:
        chosen["do_sample"] = False
    elif request.temperature is not None or request.top_p is not None:
        chosen["do_sample"] = True
        chosen |= {name: value for name in ("temperature", "top_p") if (value := getattr(request, name)) is not None}
    if request.logit_bias:
        chosen["sequence_bias"] = [[[int(token)], bias] for token, bias in request.logit_bias.items()]
    return chosen
