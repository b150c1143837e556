"""The Service of an unedited archive: its queue, its batches, its time limits, and the thread that runs its model."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from torchserve_dag.direct.torchserve_archive.handler import RAISED, ForeignHandler
from torchserve_dag.direct.torchserve_archive.request import NO_ROOM, ForeignRequest
from torchserve_dag.direct.torchserve_archive.settings import ArchiveSettings
from torchserve_dag.runtime.data.options import NOTHING_ASKED, read_options
from torchserve_dag.runtime.engine.counts import NodeCounts
from torchserve_dag.runtime.engine.timers import Timers
from torchserve_dag.runtime.messages import Failure, InputError
from torchserve_dag.runtime.telemetry.series import series_of
from torchserve_dag.runtime.worker.protocol import Metrics, OnChunk, PendingResponse, ServiceRequest

logger = logging.getLogger(__name__)

_DIED = Failure(HTTPStatus.INTERNAL_SERVER_ERROR, "Worker died.", RAISED)
"""TorchServe's answer to a batch that ended its worker."""


class ForeignService:
    """A Service that RunsOnMainThread: whole batches, one after another, on the thread that calls `run`."""

    def __init__(self, settings: ArchiveSettings, handler: ForeignHandler, *, streams: bool) -> None:
        self.name, self.version = settings.name, settings.version
        self.timeout_s: float = settings.timeout_s
        self.streams = streams
        self._settings, self._handler = settings, handler
        self._changed = threading.Condition()
        self._waiting: deque[ForeignRequest] = deque()
        self._taken: list[ForeignRequest] = []
        """The batch that is being filled, or that runs."""
        self._running: _Run | None = None
        self._closed = False
        self._counts = NodeCounts()
        self._timers = Timers(f"{settings.name} timers")

    def describe(self) -> Mapping[str, Any]:
        """What TorchServe says of a model. There is no `build.json` in an archive that was not built here."""
        settings = self._settings
        return {
            "name": settings.name,
            "version": settings.version,
            "handler": settings.handler,
            "batchSize": settings.batch,
            "maxBatchDelay": round(1000 * settings.delay_s),
            "jobQueueSize": settings.queue,
            "responseTimeout": settings.timeout_s,
        }

    def submit(self, request: ServiceRequest, on_chunk: OnChunk | None = None) -> PendingResponse:
        refusal, options = None, NOTHING_ASKED
        try:
            options = read_options(request.options)
        except InputError as error:
            refusal = Failure(error.status, error.message)
        entering = ForeignRequest(request, options, self.timeout_s, on_chunk if self.streams else None, self._leave)
        with self._changed:
            refusal = refusal or self._refusal()
            if not refusal:
                self._waiting.append(entering)
                self._changed.notify()
        if refusal:
            entering.fail(refusal)
        else:
            self._timers.schedule(entering.deadline, entering, ForeignRequest.expire)
        return entering

    @contextmanager
    def together(self) -> Iterator[None]:
        """The thread of the model sees all of them at once, and takes as many as its batch has room for."""
        with self._changed:
            yield

    def cancel(self, key: str) -> bool:
        with self._changed:
            found = [request for request in (*self._waiting, *self._taken) if request.cancel_key == key]
        for request in found:
            request.cancel()
        return bool(found)

    def metrics(self) -> Metrics:
        """Those of a workflow with one node, which is called like the model."""
        with self._changed:
            counts = self._counts.copy()
        return series_of({self.name: counts}, {})

    def gauges(self) -> Metrics:
        return {}

    def hangs(self) -> bool:
        """Whether the batch that runs has taken longer than `responseTimeout`, or its last chunk is so long ago."""
        running = self._running
        return running is not None and running.hangs

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
            taken = self._taken
        self._refuse_waiting(self._closing())
        for request in taken:
            request.fail(replace(self._closing(), type=RAISED))
        self._timers.close()

    def run(self) -> None:
        """Answer batches on this thread until `close`. Raises what ends a process: see RunsOnMainThread."""
        try:
            while batch := self._next_batch():
                self._run(batch)
        finally:
            self.close()

    def _refusal(self) -> Failure | None:
        """Why no request may enter now."""
        if self._closed:
            return self._closing()
        if self.hangs():
            return self._hanging()
        if len(self._waiting) >= self._settings.queue:
            return _unserved(f"{len(self._waiting):,} requests wait for {self.name} already, its jobQueueSize.")
        return None

    def _closing(self) -> Failure:
        return _unserved(f"{self.name} is closing.")

    def _hanging(self) -> Failure:
        return _unserved(f"{self.name} hangs, and its process has to be replaced.")

    def _leave(self, request: ForeignRequest) -> None:
        """A request was answered without the model: it makes room for another."""
        with self._changed, suppress(ValueError):
            self._waiting.remove(request)

    def _refuse_waiting(self, refusal: Failure) -> None:
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        for request in waiting:
            request.fail(refusal)

    def _watch(self, running: _Run) -> None:
        """When a batch may have run for too long: its requests are answered by then, each at its own time limit."""
        if running.hangs:
            logger.error("%s has run one batch for more than %g s", self.name, self.timeout_s)
            self._refuse_waiting(self._hanging())
        else:
            self._timers.schedule(running.deadline, running, self._watch)

    # On the model's thread.

    def _next_batch(self) -> list[ForeignRequest]:
        """Wait for a batch, as TorchServe fills it; empty when the service is closed."""
        batch: list[ForeignRequest] = []
        with self._changed:
            while not batch and not self._closed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                until = time.monotonic() + self._settings.delay_s
                while self._fill() and (left := until - time.monotonic()) > 0:
                    self._changed.wait(left)
                batch = self._taken
        return [] if self._closed else batch

    def _fill(self) -> bool:
        """Take requests until the batch is full. Returns whether it has room, and anybody to wait for others."""
        self._taken = [request for request in self._taken if not request.obsolete]
        while self._waiting and len(self._taken) < self._settings.batch:
            request = self._waiting.popleft()
            if request.deadline > time.monotonic():  # else nobody waits for it, and its timer answers it
                self._taken.append(request)
        return 0 < len(self._taken) < self._settings.batch and not self._closed

    def _run(self, batch: list[ForeignRequest]) -> None:
        """Raises what is no Exception, such as SystemExit."""
        began, failed = time.monotonic(), len(batch)
        self._running = running = _Run(self.timeout_s)
        self._timers.schedule(running.deadline, running, self._watch)
        try:
            failed = self._handler.answer(batch, running.go_on)
        except BaseException as error:
            logger.error("%s ends this process: %s", self.name, type(error).__name__)  # noqa: TRY400 (no fault)
            for request in batch:
                request.fail(_DIED)
            raise
        finally:
            running.obsolete, self._running = True, None
            with self._changed:
                self._taken = []
                waits_s = [began - request.entered for request in batch]
                self._counts.record_batch(waits_s, time.monotonic() - began, failed)


def _unserved(why: str) -> Failure:
    return Failure(HTTPStatus.SERVICE_UNAVAILABLE, f"{why} Try again in a second.", NO_ROOM)


class _Run:
    """A batch on the model's thread."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self.obsolete = False
        """Whether it has ended."""
        self.go_on()

    def go_on(self) -> None:
        """It has begun, or sent a chunk."""
        self.deadline = time.monotonic() + self._limit_s

    @property
    def hangs(self) -> bool:
        return not self.obsolete and time.monotonic() >= self.deadline
