"""An engine in a process of its own, from the worker's side: started, watched, started again when it ends.

Some engines hold Python's lock for a whole step. In the worker, each thread that sends or receives would wait for the
step's end. So the worker only makes tokens of requests, and one thread reads what the engine's process sends.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable

from torchserve_dag.runtime.compat.process import Process, ProcessError, ProcessTooSlowError
from torchserve_dag.runtime.handler import EngineLoad, Reply
from torchserve_dag.runtime.messages import Chat, InputError, OverloadedError, Prompt, TextChunk
from torchserve_dag.runtime.models.handler_process import PAUSES_S
from torchserve_dag.runtime.models.language import engine as interface
from torchserve_dag.runtime.models.language.counted import CountedPrompts
from torchserve_dag.runtime.models.language.engine_errors import EngineEndedError, EngineTimeoutError
from torchserve_dag.runtime.models.language.process.message_socket import MessageSocket
from torchserve_dag.runtime.models.language.process.messages import (
    AnswerFailed,
    CancelAnswer,
    EngineLoaded,
    EngineNotLoaded,
    EngineSpec,
    Progress,
    StartAnswer,
)

logger = logging.getLogger(__name__)

PROGRAM = "torchserve_dag.runtime.models.language.process.program"
STARTUP_S = 1800.0
"""How long loading a model may take."""
SILENT_S = 60.0
"""A process that says nothing for so long while answers are in progress is ended."""
LOOK_S = 1.0
MOST_UNSENT = 1 << 28
"""Bytes that wait for a process that does not read: then requests are refused."""
CLOSE_S = 10.0
CLIENT_CLOSED = 499
"""What servers write into their logs for a client that has left."""


class EngineProcess:
    """See LanguageEngine. It lives until `close`, one process after another."""

    def __init__(
        self, spec: EngineSpec, load_prompts: Callable[[], interface.PromptReader], silent_s: float = SILENT_S
    ) -> None:
        """Start the process, and wait until the model is loaded; meanwhile, `load_prompts` gives what reads prompts.

        Raises what the engine's `load` raises, and ValueError for a process that ends while it loads.
        """
        self._spec, self._silent_s = spec, silent_s
        self._name = f"{spec.settings.engine} {spec.settings.model}"
        self._changed = threading.Condition()
        self._answers: dict[int, Reply[TextChunk]] = {}
        """Those in progress, by their numbers."""
        self._numbers = itertools.count()
        self._process: Process | None = None
        self._messages: MessageSocket | None = None
        """To the process, once the model is loaded there."""
        self._loaded: EngineLoaded | None = None
        self._error: Exception | None = None
        """Why it has never been loaded."""
        self._now = EngineLoad()
        self._heard = time.monotonic()
        """When the process was last known to go on, or had nothing to do."""
        self._closed = self._over = self._served = False
        """`_served`: this process has written an answer to its end."""
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.settimeout(0)
        # A process ends with the thread that starts it, so this one lives as long as the engine.
        self._thread = threading.Thread(target=self._keep, name=f"{self._name} process", daemon=True)
        self._thread.start()
        try:
            self._prompts = CountedPrompts(load_prompts())
            loaded = self._wait()
        except BaseException:
            self.close()
            raise
        self.supports, self.room, self.context = loaded

    @property
    def pid(self) -> int | None:
        """The process's id, where there is one."""
        process = self._process
        return process.pid if process else None

    def count(self, request: Chat | Prompt) -> int:
        return self._prompts.count(request)

    def start(self, request: Chat | Prompt, most_tokens: int, reply: Reply[TextChunk]) -> interface.Cancel:
        """See LanguageEngine; what only the engine itself can refuse, `reply` fails with."""
        prompt = self._prompts.take(request)
        with self._changed:
            messages = self._messages
            if messages is None or messages.unsent > MOST_UNSENT:
                raise OverloadedError("The model's process is being started again; try again in a few seconds.")
            if not self._answers:
                self._heard = time.monotonic()
            number = next(self._numbers)
            self._answers[number] = reply
        self._send(messages, StartAnswer(number, request, prompt, most_tokens))
        return lambda: self._cancel(number)

    def load_now(self) -> EngineLoad:
        return self._now

    def hangs(self) -> bool:
        """Only if its process cannot be started again: one without progress is ended, and another is started."""
        return self._over and not self._closed

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            process = self._process
        if process:
            process.interrupt()
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_S)

    def _wait(self) -> EngineLoaded:
        with self._changed:
            self._changed.wait_for(lambda: self._loaded or self._over)
        if self._loaded is None:
            raise self._error or ValueError(f"{self._name}: it was closed while it was loading")
        return self._loaded

    def _cancel(self, number: int) -> None:
        with self._changed:
            reply, messages = self._answers.pop(number, None), self._messages
        if reply is None:
            return
        if messages is not None:
            self._send(messages, CancelAnswer(number))
        reply.fail(InputError("The request was cancelled.", CLIENT_CLOSED))

    def _send(self, messages: MessageSocket, message: object) -> None:
        messages.send(message)
        if messages.unsent:
            with contextlib.suppress(OSError):  # it is full, so the thread is about to wake; or it is closed
                self._wake.send(b"\0")

    # The thread that keeps a process alive, and reads what it sends.

    def _keep(self) -> None:
        failed = 0
        try:
            while not self._closed and failed < len(PAUSES_S):
                try:
                    self._run()
                except Exception as error:  # noqa: BLE001 (whatever happens, answers must not wait for ever)
                    if self._closed:
                        return
                    if self._loaded is None:
                        self._error = _as_load_error(self._name, error)
                        return
                    failed = (0 if self._served else failed) + 1
                    self._recover(error, PAUSES_S[failed - 1])
        finally:
            with self._changed:
                self._over, self._messages = True, None
                self._changed.notify_all()
            self._fail_all(OverloadedError("The model is closed."))
            self._wake.close()
            self._woken.close()

    def _run(self) -> None:
        """Have a process compute until the engine is closed. Raises ProcessError, and what loading raises."""
        process = Process(self._name, None, {"path": sys.path}, PROGRAM)
        with self._changed:
            self._process = process
        if self._closed:
            process.interrupt()
        try:
            messages = MessageSocket(process.link)
            messages.send(self._spec)
            self._follow(process, messages)
        finally:
            with self._changed:
                self._process = None
            process.end()

    def _follow(self, process: Process, messages: MessageSocket) -> None:
        begun = time.monotonic()
        while not self._closed:
            messages.wait(LOOK_S, self._woken)
            self._read(process, messages)
            self._check_progress(process, begun)

    def _read(self, process: Process, messages: MessageSocket) -> None:
        try:
            received = messages.receive()
        except EOFError:
            raise process.ended() from None
        if received:
            self._heard = time.monotonic()
        for message in received:
            match message:
                case Progress():
                    self._take(message)
                case EngineLoaded():
                    with self._changed:
                        self._loaded, self._messages = message, messages
                        self._changed.notify_all()
                case EngineNotLoaded(error):
                    raise error

    def _take(self, progress: Progress) -> None:
        self._now = progress.load
        for number, event in progress.events:
            if isinstance(event, TextChunk):
                if reply := self._answers.get(number):
                    reply.chunk(event)
                continue
            with self._changed:
                reply = self._answers.pop(number, None)
            if reply is None:
                continue
            if isinstance(event, AnswerFailed):
                reply.fail(event.exception())
            else:
                self._served = True
                reply.end()
        if progress.hangs:
            raise ProcessTooSlowError("its engine made no progress, so its process was ended")

    def _check_progress(self, process: Process, begun: float) -> None:
        """Raises ProcessTooSlowError."""
        now = time.monotonic()
        if self._messages is None and now - begun > STARTUP_S:
            raise ProcessTooSlowError(f"it was not loaded within {STARTUP_S:g} s")
        if not self._answers:
            self._heard = now
        elif now - self._heard > self._silent_s:
            process.kill()
            raise ProcessTooSlowError(f"it made no progress for {self._silent_s:g} s, so its process was ended")

    def _recover(self, error: Exception, pause_s: float) -> None:
        """After the end of a process: fail its answers, and pause before the next."""
        with self._changed:
            self._messages = None
        self._now, self._served = EngineLoad(), False
        known = isinstance(error, ProcessError)
        logger.error(
            "%s: %s; another is started in %d s", self._name, error, pause_s, exc_info=None if known else error
        )
        again = "another is being started. Try again."
        if isinstance(error, ProcessTooSlowError):
            self._fail_all(EngineTimeoutError(f"The model made no progress with this answer: {again}"))
        else:
            self._fail_all(EngineEndedError(f"The model's process ended while it wrote this answer: {again}"))
        with self._changed:
            self._changed.wait_for(lambda: self._closed, pause_s)

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            answers, self._answers = self._answers, {}
        for reply in answers.values():
            reply.fail(error)


def _as_load_error(name: str, error: Exception) -> Exception:
    return ValueError(f"{name}: {error} while it was loading") if isinstance(error, ProcessError) else error
