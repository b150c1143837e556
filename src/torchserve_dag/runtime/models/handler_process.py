"""An unedited TorchServe handler as a node: batches go to a process of its own, which is watched and started again.

TorchServe gives a handler a process: its main thread, its folder, its signals, and whatever else a process has only
once. So does this file, for each node. A batch whose process ends fails, and nothing else does.
"""

from __future__ import annotations

import logging
import select
import socket
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.compat import link
from torchserve_dag.runtime.compat.process import Process, ProcessError, ProcessTooSlowError
from torchserve_dag.runtime.compat.rows import wire_request
from torchserve_dag.runtime.compat.wire import WireRequest, WireResponse
from torchserve_dag.runtime.data import codec
from torchserve_dag.runtime.engine.runner import END, Chunk, Deliver
from torchserve_dag.runtime.messages import Failure, InputError

logger = logging.getLogger(__name__)

PAUSES_S = (0, 1, 1, 2, 3, 5, 8, 13, 21, 30)
"""Seconds until the next process is started, by how many have failed in a row; TorchServe's pauses begin like this."""

REFUSE_AFTER = 3
"""From so many failed processes in a row on, requests are refused while there is none, instead of waiting for it."""


@dataclass(frozen=True, slots=True)
class HandlerSpec:
    """What a process runs, and how long it may take."""

    name: str
    """The node's code."""
    source: str
    """The archive's or the function's name, for the sentence that it cannot be loaded."""
    folder: Path
    """An unpacked archive: the process's working directory."""
    handler: str
    """`FILE`, or `FILE:FUNCTION`, as a manifest has it."""
    gives: Any
    """The type of each answer, or of each chunk."""
    streams: bool
    gpu: int | None
    batch: int
    startup_s: float
    limit_s: float
    """The longest time of a batch."""


class HandlerProcess:
    """Answers batches, one at a time, in a process that is kept alive until `close`; a BatchStarter."""

    def __init__(self, spec: HandlerSpec, folder: tempfile.TemporaryDirectory[str] | None = None) -> None:
        """Start the process, and return at once: `wait` waits for the handler. `folder` is deleted with the process."""
        self.spec = spec
        self._folder = folder
        self._changed = threading.Condition()
        self._waiting: _Batch | None = None
        """The batch that the process takes next."""
        self._process: Process | None = None
        self._refusal: Failure | None = None
        """Why batches are not accepted."""
        self._loaded = self._closed = self._over = False
        self._wake, self._woken = socket.socketpair()
        # A process ends with the thread that starts it (child.py), so this one lives as long as the handler.
        self._thread = threading.Thread(target=self._keep, name=f"{spec.name} process", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """The process's id, where there is one."""
        process = self._process
        return process.pid if process else None

    def wait(self) -> None:
        """Wait until the handler is loaded. Raises RuntimeError if it cannot be."""
        with self._changed:
            self._changed.wait_for(lambda: self._loaded or self._over)
            if not self._loaded:
                raise RuntimeError(self._refusal.message if self._refusal else f"{self.spec.source}: it is closed")

    def __call__(self, items: Sequence[tuple[str, Any]], deliver: Deliver) -> None:
        """Start a batch: the id of each item's request, and its value, a Row or a message."""
        with self._changed:
            refusal = self._refusal
            if refusal is None:
                self._waiting = _Batch(self.spec, items, deliver)
                self._wake.send(b"\0")
        if refusal:
            deliver(dict.fromkeys(range(len(items)), refusal))

    def close(self) -> None:
        """End the process, and return at once: `join` waits for its end. A batch in it fails."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            process = self._process
            if not self._over:
                self._wake.send(b"\0")
        if process:
            process.interrupt()

    def join(self) -> None:
        """Wait until the process has ended and its folder is deleted."""
        if self._thread is not threading.current_thread():  # the callback of an answer may close everything
            self._thread.join(10)

    # The thread that keeps a process alive.

    def _keep(self) -> None:
        failed = 0
        running: _Batch | None = None
        try:
            while not self._closed:
                try:
                    process = self._start()
                    try:
                        while running := self._next(process):
                            running.run(process)
                            failed = 0
                    finally:
                        process.end()
                except Exception as error:  # noqa: BLE001 (whatever happens, items must not wait for ever)
                    if self._closed:
                        return
                    failed += 1
                    if not self._loaded:
                        self._refuse(f"{self.spec.source}: {error}")
                        return
                    self._recover(error, failed, running)
        finally:
            self._finish(running)

    def _start(self) -> Process:
        spec = self.spec
        settings = {"handler": spec.handler, "gpu": spec.gpu, "batch": spec.batch}
        process = Process(spec.name, spec.folder, settings)
        with self._changed:
            self._process = process
        if self._closed:
            process.interrupt()
        try:
            process.loaded(spec.startup_s)
        except BaseException:
            process.end()
            raise
        with self._changed:
            self._refusal, self._loaded = None, True
            self._changed.notify_all()
        return process

    def _next(self, process: Process) -> _Batch | None:
        """Wait for the next batch; None when the handler is closed. Raises ProcessError if the process ends before."""
        poll = select.poll()
        poll.register(process, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while not self._closed:
            ready = dict(poll.poll(0 if self._waiting else None))
            if self._closed:
                break
            if process.fileno() in ready:  # a process that has ended gets no batch
                process.idle()
            if self._woken.fileno() in ready:
                self._woken.recv(64)
            with self._changed:
                batch, self._waiting = self._waiting, None
            if batch:
                return batch
        return None

    def _recover(self, error: Exception, failed: int, running: _Batch | None) -> None:
        """After the end of a process: fail its batch, and pause before the next."""
        name = self.spec.name
        pause_s = PAUSES_S[min(failed, len(PAUSES_S)) - 1]
        logger.error(
            "%s: %s; another is started in %d s",
            name,
            error,
            pause_s,
            exc_info=None if isinstance(error, ProcessError) else error,
        )
        if failed >= REFUSE_AFTER:
            self._refuse(
                f"{name} does not run: {error}, {failed} times in a row. It is started again; "
                "torchserve-dag logs says more."
            )
        if running:
            running.fail(_failure(self.spec, error))
        with self._changed:
            self._changed.wait_for(lambda: self._closed, pause_s)

    def _refuse(self, why: str) -> Failure:
        """Accept no batches until a process is loaded."""
        refusal = Failure(HTTPStatus.SERVICE_UNAVAILABLE, why, "HandlerUnavailable", self.spec.name)
        with self._changed:
            self._refusal = refusal
            waiting, self._waiting = self._waiting, None
        if waiting:
            waiting.fail(refusal)
        return refusal

    def _finish(self, running: _Batch | None) -> None:
        refusal = self._refusal if self._refusal and not self._closed else self._refuse(f"{self.spec.name} is closing.")
        if running:
            running.fail(refusal)
        with self._changed:
            self._over = True
            self._changed.notify_all()
            self._wake.close()
            self._woken.close()
        if self._folder:
            self._folder.cleanup()


class _Batch:
    """A batch, until each of its items has its answer."""

    def __init__(self, spec: HandlerSpec, items: Sequence[tuple[str, Any]], deliver: Deliver) -> None:
        self._spec = spec
        self._items = items
        self._deliver = deliver
        self._open: set[int] = set(range(len(items)))
        self._began = False
        """Whether chunks of an answer have been delivered, so that the batch cannot be tried again."""

    def run(self, process: Process) -> None:
        """Answer each item. TorchServe would fail a whole batch; here its items are tried again one by one, once.

        Raises ProcessError, and then `fail` answers the items that are left.
        """
        requests = self._requests()
        whole = self._ask(process, requests) if requests else None
        if whole and (self._began or len(requests) == 1):
            self.fail(whole)
        elif whole:
            for place, request in requests.items():
                if alone := self._ask(process, {place: request}):
                    self._give({place: alone})

    def fail(self, failure: Failure) -> None:
        """Answer the items that are left with a failure."""
        self._give(dict.fromkeys(sorted(self._open), failure))

    def _requests(self) -> dict[int, WireRequest]:
        """The items as TorchServe would send them, by their places."""
        requests: dict[int, WireRequest] = {}
        names: set[str] = set()
        for place, (request_id, value) in enumerate(self._items):
            name = f"{request_id}-{place}" if request_id in names else request_id  # several elements of one request
            names.add(name)
            try:
                requests[place] = wire_request(name, value)
            except Exception as error:  # noqa: BLE001 (whatever encoding raises)
                what = f"request {request_id}: its input cannot be sent to {self._spec.name}"
                fault = logs.report(logger, error, what)
                failure = self._failure(f"The input of {self._spec.name} cannot be written.")
                self._give({place: replace(failure, fault=fault)})
        return requests

    def _ask(self, process: Process, requests: Mapping[int, WireRequest]) -> Failure | None:
        """Have requests answered, and deliver what comes. Returns the failure where all of them failed together."""
        spec, end = self._spec, time.monotonic() + self._spec.limit_s
        process.ask(list(requests.values()), spec.limit_s)
        places = {request.id: place for place, request in requests.items()}
        bodies: dict[int, bytes] = {}
        """The chunks so far of answers that are declared to be whole."""
        while True:
            message = process.answer(end - time.monotonic(), spec.limit_s)
            last = message.kind == link.ANSWER
            if last and message.code >= HTTPStatus.BAD_REQUEST:
                what, _, fault = message.text.partition(link.FAULT)
                return replace(self._failure(what, message.code), fault=fault)
            responses = {place: r for r in message.responses if (place := places.get(r.id, -1)) in self._open}
            if spec.streams:
                self._began = True
                self._give({place: self._chunk(r) for place, r in responses.items() if r.body})
            elif not last:
                bodies |= {place: bodies.get(place, b"") + r.body for place, r in responses.items()}
            else:
                self._give({place: self._answer(r, bodies.get(place, b"") + r.body) for place, r in responses.items()})
            if last:
                rest = END if spec.streams else self._failure(f"{spec.name} gave no answer.")
                self._give(dict.fromkeys(self._open & requests.keys(), rest))
                return None

    def _chunk(self, response: WireResponse) -> Any:
        answer = self._answer(response, response.body)
        return answer if isinstance(answer, Failure) else Chunk(answer)

    def _give(self, answers: Mapping[int, Any]) -> None:
        """Deliver answers; what is no chunk is an item's last."""
        self._open -= {place for place, answer in answers.items() if not isinstance(answer, Chunk)}
        if answers:
            self._deliver(answers)

    def _answer(self, response: WireResponse, body: bytes) -> Any:
        """An answer, or a chunk, as the type that is declared."""
        spec, status = self._spec, response.status
        if status >= HTTPStatus.BAD_REQUEST:
            ours = codec.failure_in(body)  # an archive of ours answers with a complete failure
            text = body.decode("utf-8", "replace")[:500]
            return replace(ours, node=spec.name) if ours else self._failure(text, status)
        try:
            return codec.decode_answer(spec.gives, body)
        except InputError as error:
            return self._failure(f"{spec.name} did not answer with {codec.describe(spec.gives)}. {error.message}")
        except Exception as error:  # noqa: BLE001 (a dataclass's own __post_init__ may raise anything)
            fault = logs.report(logger, error, f"the answer of {spec.name} cannot be read")
            return replace(self._failure(f"The answer of {spec.name} cannot be read."), fault=fault)

    def _failure(self, what: str, status: int = HTTPStatus.INTERNAL_SERVER_ERROR) -> Failure:
        return Failure(status, what, "HandlerError", self._spec.name)


def _failure(spec: HandlerSpec, error: Exception) -> Failure:
    """The failure of the batch that a process had."""
    name = spec.name
    if isinstance(error, ProcessTooSlowError):
        message = f"{name} took longer than {spec.limit_s:g} s: its process was ended, and another is being started."
        return Failure(HTTPStatus.GATEWAY_TIMEOUT, message, "Timeout", name)
    message = f"{name}: {error} while it had this request; another is being started. Try again."
    return Failure(HTTPStatus.INSUFFICIENT_STORAGE, message, "WorkerDied", name)  # TorchServe's status
