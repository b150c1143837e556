"""The program of an engine's process: it loads the engine, and answers what the worker starts until the worker ends.

The thread that steps the engine sends what a step gave, and reads what has come meanwhile, before the next step. Where
a step holds Python's lock, no other thread of this process could do so earlier.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.compat import link
from torchserve_dag.runtime.compat.child import end_with_worker
from torchserve_dag.runtime.handler import EngineLoad
from torchserve_dag.runtime.messages import InputError, TextChunk
from torchserve_dag.runtime.models.language import engine as interface
from torchserve_dag.runtime.models.language.process.message_socket import MessageSocket
from torchserve_dag.runtime.models.language.process.messages import (
    AnswerFailed,
    CancelAnswer,
    EngineLoaded,
    EngineNotLoaded,
    EngineSpec,
    Event,
    Progress,
    StartAnswer,
    carried,
)

logger = logging.getLogger(__name__)

BEAT_S = 0.5
"""While there is something to do, the worker hears of it at least so often, unless a step holds Python's lock."""


def main() -> None:
    """Serve the worker's socket, whose descriptor is this program's argument, until the worker closes it."""
    end_with_worker()
    worker = socket.socket(fileno=int(sys.argv.pop()))
    settings = link.receive(worker)
    if settings is None:
        return
    known = set(sys.path)
    sys.path += [folder for folder in json.loads(settings[1])["path"] if folder not in known]
    os.environ.setdefault("TQDM_DISABLE", "1")  # no bars of progress in the log
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING)
    logging.getLogger().handlers[0].setFormatter(logs.Formatter())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    messages = MessageSocket(worker)
    try:
        _serve(messages)
    finally:
        sys.stdout.flush()
        os._exit(0)  # not by the interpreter's end: a step may be under way, in C++


def _serve(messages: MessageSocket) -> None:
    try:
        engine = _loaded(_first(messages))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 (whatever a library raises, the worker says it)
        messages.send(EngineNotLoaded(carried(error)))
        while messages.unsent:
            messages.wait(None)
        return
    serving = EngineService(engine, messages)
    messages.send(EngineLoaded(engine.supports, engine.room, engine.context))
    serving.run()


def _first(messages: MessageSocket) -> EngineSpec:
    """Raises EOFError."""
    found: list[EngineSpec] = []
    while not found:
        messages.wait(None)
        found = messages.receive()
    return found[0]


def _loaded(spec: EngineSpec) -> interface.StepEngine:
    if spec.placement is not None:
        from torchserve_dag.runtime.compute.cores import share_cores  # noqa: PLC0415

        share_cores(spec.placement.lanes)
    engine: interface.StepEngine = import_module(spec.module).load(spec.folder, spec.settings, spec.placement)
    return engine


class EngineService:
    """Does what the worker says, and tells it what the answers get."""

    def __init__(self, engine: interface.StepEngine, messages: MessageSocket) -> None:
        self._engine, self._messages = engine, messages
        self._cancels: dict[int, interface.Cancel] = {}
        """Of each answer in progress, by its number."""
        self._events: list[tuple[int, Event]] = []
        self._told = (EngineLoad(), False)
        self._telling, self._reading, self._changing = threading.Lock(), threading.Lock(), threading.Lock()
        engine.after_steps(self._after_step)

    def run(self) -> None:
        """Until the worker closes its socket."""
        beat = time.monotonic()
        while True:
            busy = self._cancels or self._told[0].running or self._told[0].waiting
            self._messages.wait(BEAT_S if busy else None)
            try:
                self._read()
            except EOFError:
                return
            if time.monotonic() - beat >= BEAT_S:
                beat = time.monotonic()
                self._tell(always=bool(self._cancels))

    def event(self, answer: int, event: Event) -> None:
        """What an answer gets. The worker hears of it after the step."""
        self._events.append((answer, event))
        if not isinstance(event, TextChunk):
            self._taken(answer)

    def _after_step(self) -> None:
        self._tell()
        try:
            self._read()
        except EOFError:
            os._exit(0)

    def _tell(self, *, always: bool = False) -> None:
        with self._telling:  # what one step gave is sent before what the next one gives
            events, self._events = self._events, []
            now = (self._engine.load_now(), self._engine.hangs())
            if events or always or now != self._told:
                self._told = now
                self._messages.send(Progress(events, *now))

    def _read(self) -> None:
        """Do what has come. Raises EOFError."""
        with self._reading:  # an answer is started before it is cancelled
            for message in self._messages.receive():
                if isinstance(message, StartAnswer):
                    self._start(message)
                elif isinstance(message, CancelAnswer):
                    self._taken(message.answer)()
        if self._events:
            self._tell()

    def _start(self, start: StartAnswer) -> None:
        reply = _Reply(start.answer, self.event)
        with self._changing:
            self._cancels[start.answer] = _nothing
        try:
            cancel = self._engine.start_tokens(start.request, start.prompt, start.most_tokens, reply)
        except Exception as error:  # noqa: BLE001 (it is this answer that fails)
            reply.fail(error)
            return
        with self._changing:
            if start.answer in self._cancels:  # it has not ended yet
                self._cancels[start.answer] = cancel

    def _taken(self, answer: int) -> interface.Cancel:
        """What cancels an answer, which is not in progress from now on."""
        with self._changing:
            return self._cancels.pop(answer, _nothing)


class _Reply:
    """An answer's reply, whose other end is in the worker."""

    def __init__(self, answer: int, on_event: Callable[[int, Event], None]) -> None:
        self._answer, self._on_event = answer, on_event

    def chunk(self, chunk: TextChunk) -> None:
        self._on_event(self._answer, chunk)

    def end(self) -> None:
        self._on_event(self._answer, None)

    def fail(self, error: BaseException) -> None:
        if isinstance(error, Exception) and not isinstance(error, InputError):
            logs.report(logger, error, "the engine raised")
        self._on_event(self._answer, AnswerFailed.of(error))


def _nothing() -> None:
    """It has ended, or has not begun."""


if __name__ == "__main__":
    main()
