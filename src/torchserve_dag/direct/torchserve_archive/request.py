"""A request in the service: it is answered once, by whoever is first: the model, its client, or the clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from http import HTTPStatus

from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.engine.streaming import UNPACED_BYTES, UNREAD
from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.worker.protocol import OnChunk, ServiceRequest, ServiceResponse
from torchserve_dag.runtime.worker.response import write_failure, write_failure_after_chunks

NO_ROOM = "ServiceUnavailableException"
"""TorchServe's type of a failure for a request that no worker has seen: sending it again is safe."""
_CANCELLED = Failure(499, "The client cancelled the request.", "Cancelled")


class ForeignRequest:
    """A PendingResponse. Every method may be called from every thread."""

    def __init__(
        self,
        request: ServiceRequest,
        options: Options,
        longest_s: float,
        on_chunk: OnChunk | None,
        leave: Callable[[ForeignRequest], None],
    ) -> None:
        """`longest_s`: how long it may take; `leave` is called when it is answered without the model."""
        self.request = request
        self.cancel_key = options.cancel_key
        self.entered = time.monotonic()
        self._limit_s = min(longest_s, options.timeout_s or longest_s)
        self._late = HTTPStatus.GATEWAY_TIMEOUT if self._limit_s == longest_s else HTTPStatus.REQUEST_TIMEOUT
        self.deadline = self.entered + self._limit_s - options.waited_s
        self._on_chunk, self._leave = on_chunk, leave
        self._kept: list[tuple[bytes, str]] = []
        """The chunks so far, with their content types, where the client wants the answer as a whole."""
        self._began = self._sending = False
        """Whether a chunk has been sent, and whether one is being sent, which the response must not overtake."""
        self._unread = 0
        """Bytes of the chunks that the client has not taken."""
        self._response: ServiceResponse | None = None
        self._future: Future[ServiceResponse] = Future()
        self._lock = threading.Lock()

    @property
    def obsolete(self) -> bool:
        """Whether it is answered."""
        return self._response is not None

    def result(self, timeout_s: float) -> ServiceResponse:
        return self._future.result(timeout_s)

    def add_done_callback(self, callback: Callable[[ServiceResponse], None]) -> None:
        self._future.add_done_callback(lambda future: callback(future.result()))

    def cancel(self) -> None:
        self.fail(_CANCELLED)
        self._leave(self)

    def expire(self) -> None:
        """Answer at the deadline: 504, or 408 if the client chose the limit, which is then no failure of the model."""
        self.fail(Failure(self._late, f"No answer within {self._limit_s:g} s.", "Timeout"))
        self._leave(self)

    def send_chunk(self, body: bytes, content_type: str) -> None:
        """Send a part of the answer, or keep it until the rest is there."""
        with self._lock:
            if self.obsolete or not body:  # an empty chunk would end an answer in HTTP
                return
            if self._on_chunk is None:
                self._kept.append((body, content_type))
                return
            self._began = self._sending = True
            self._unread += len(body)
        try:
            self._on_chunk(body, content_type, partial(self._taken, len(body)))
        finally:
            with self._lock:
                self._sending = False
                response = self._response
            if response:
                self._future.set_result(response)
        if self._unread > UNPACED_BYTES:  # nothing holds a handler of TorchServe's back
            self.fail(UNREAD)
            self._leave(self)

    def _taken(self, size: int) -> None:
        with self._lock:
            self._unread -= size

    def answer(self, response: ServiceResponse) -> None:
        """Answer with what the handler gave, which is the rest of the answer if it sent chunks."""
        self._settle(lambda: self._whole(response))

    def fail(self, failure: Failure) -> None:
        self._settle(lambda: self._failed(failure))

    def _settle(self, write: Callable[[], ServiceResponse]) -> None:
        with self._lock:
            if self.obsolete:
                return
            response = self._response = write()
            if self._sending:  # its thread answers when the chunk is sent
                return
        self._future.set_result(response)

    def _whole(self, response: ServiceResponse) -> ServiceResponse:
        if self._began:
            return ServiceResponse(response.body, response.content_type)
        if not self._kept:
            return response
        body = b"".join(chunk for chunk, _ in self._kept) + response.body
        return replace(response, body=body, content_type=response.content_type or self._kept[0][1])

    def _failed(self, failure: Failure) -> ServiceResponse:
        if self._began:
            return write_failure_after_chunks(failure, self.request.id)
        response = write_failure(failure, self.request.id)
        return replace(response, headers={"Retry-After": "1"}) if failure.type == NO_ROOM else response
