"""Asynchronous mode: every request is answered as soon as its answer is ready, in chunks if the answer streams.

TorchServe starts such a worker with `--async`. Its own loop for them (`ts/async_service.py`) writes to the socket from
two threads without a lock, and prints a line and copies its whole context for each request. `guard.py` replaces that
loop, and starts the process in which this file loads the model and answers.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.compat.wire import READ_BYTES, WireReader, WireRequest, read_requests
from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.worker import output
from torchserve_dag.runtime.worker.protocol import Service, ServiceResponse
from torchserve_dag.runtime.worker.service import load
from torchserve_dag.runtime.worker.torchserve import batched
from torchserve_dag.runtime.worker.torchserve.batched import EXIT_HANGS, Context, hangs_before
from torchserve_dag.runtime.worker.torchserve.exchange import Exchange
from torchserve_dag.runtime.worker.torchserve.guard import DIED, HOLD, LOADED, Guard
from torchserve_dag.runtime.worker.torchserve.rows import control, over_rest, read_request

logger = logging.getLogger(__name__)

GIVE_UP_S = 5
"""How long TorchServe may take to read the failures of the unanswered requests."""
QUIET_S, LAST_REQUESTS_S = 0.1, 1.0
"""A connection is ended once TorchServe has sent nothing for QUIET_S, after LAST_REQUESTS_S at the latest."""

_BROKEN = Failure(HTTPStatus.INTERNAL_SERVER_ERROR, "The worker failed.", "InternalError")


def handle(rows: list[dict[str, Any]] | None, context: Context) -> list[bytes]:
    """TorchServe's entry point. In asynchronous mode TorchServe calls it once, without rows, to load."""
    main = sys.modules["__main__"]
    if rows is not None or "--async" not in sys.argv or not hasattr(main, "AsyncService"):
        return batched.handle(rows, context)  # the worker is in batched mode, or runs this archive as a node of another
    folder, gpu = Path(context.system_properties["model_dir"]), context.system_properties.get("gpu_id")
    vars(main).pop("AsyncService")  # so that the guard is not replaced by an archive that is a node of this one
    vars(main)["AsyncService"] = _StandIn(_guard(folder, gpu, context.model_yaml_config["startupTimeout"]))
    return []


class _StandIn:
    """Replaces TorchServe's AsyncService, of which its worker calls `AsyncService(service).run()` after loading."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def __call__(self, torchserve_service: Any) -> _StandIn:
        self._connection = torchserve_service.cl_socket
        return self

    def run(self) -> NoReturn:
        self._guard.run(self._connection)


def _guard(folder: Path, gpu: int | None, startup_s: float) -> Guard:
    """Raises RuntimeError where the model cannot be loaded."""
    return Guard(partial(_serve, folder, gpu), startup_s)


def _serve(folder: Path, gpu: int | None, link: socket.socket) -> NoReturn:
    """Load the model, and answer the requests that come over the link, until the guard ends."""
    loaded = threading.Event()
    output.take_over()
    threading.Thread(target=_end_with_guard, args=(link, loaded), daemon=True).start()
    try:
        service = load(folder, gpu)
    except BaseException:
        output.hand_back()
        raise
    loaded.set()
    link.sendall(LOADED)
    output.command(f"[PID]{os.getpid()}\n")  # TorchServe reads this line for the pid that it reports
    batched.publish(service)
    _, (connection, *_), *_ = socket.recv_fds(link, 1, 1)
    loop = AsynchronousLoop(service, link)
    threading.Thread(target=loop.end_when_it_hangs, name="end when it hangs", daemon=True).start()
    loop.run()
    if loop.holding:
        loop.drain()
        os._exit(EXIT_HANGS)
    torchserve = socket.socket(fileno=connection)
    if not _happens(torchserve, select.POLLRDHUP, 0):  # the guard has ended, and not TorchServe
        loop.give_up(torchserve)
    os._exit(1)


def _end_with_guard(link: socket.socket, loaded: threading.Event) -> None:
    """End this process if the guard ends while the model is still being loaded."""
    while not loaded.is_set():
        if _happens(link, select.POLLRDHUP, 1) and not loaded.is_set():
            os._exit(1)


def _happens(side: socket.socket, event: int, within_s: float) -> bool:
    """Whether there is this event of `select.poll` at a socket, or its end, within a time."""
    poll = select.poll()
    poll.register(side, event)
    return bool(poll.poll(within_s * 1000))


class AsynchronousLoop:
    """Answers the requests from a socket with a service."""

    def __init__(self, service: Service, link: socket.socket) -> None:
        self._service = service
        self._link = link
        self._sending = threading.Lock()
        self._unanswered: dict[str, Exchange] = {}
        """The unanswered requests, by TorchServe's id."""
        self.holding = False
        """Whether this process has told the guard to send no more requests, and then to close the link."""

    def run(self) -> None:
        """Serve the socket until the other side closes it."""
        messages: WireReader[list[WireRequest]] = WireReader(read_requests)
        while data := _receive(self._link):
            for requests, _ in messages.feed(data):
                for wire in requests:
                    self._begin(wire)

    def end_when_it_hangs(self) -> None:
        """If a model hangs, let no more requests in. The process ends once the others are answered: see `_serve`."""
        if hangs_before(threading.Event(), self._service):
            self.holding = True
            with self._sending:
                self._link.sendall(HOLD)

    def drain(self) -> None:
        """Wait until all requests are answered."""
        deadline = time.monotonic() + self._service.timeout_s + 1
        while self._unanswered and time.monotonic() < deadline:
            time.sleep(0.1)

    def give_up(self, connection: socket.socket) -> None:
        """Fail the unanswered requests, and those that TorchServe has sent since, over TorchServe's own connection.

        TorchServe (0.12.0) may forget the request that it is sending while the connection ends. So the connection ends
        when TorchServe sends nothing, if there is such a time.
        """
        connection.settimeout(GIVE_UP_S)
        with self._sending:
            exchanges, self._unanswered = self._unanswered, {}
            for exchange in exchanges.values():
                connection.sendall(exchange.failure(DIED))
        unread: WireReader[list[WireRequest]] = WireReader(read_requests)
        deadline = time.monotonic() + LAST_REQUESTS_S
        while _happens(connection, select.POLLIN, QUIET_S) and (data := _receive(connection)):
            for requests, _ in unread.feed(data):
                for wire in requests:
                    connection.sendall(Exchange(wire.id, over_rest(wire.headers), wire.id).failure(DIED))
            if time.monotonic() > deadline:
                connection.shutdown(socket.SHUT_RD)  # what it sends now fails

    def _begin(self, wire: WireRequest) -> None:
        request = read_request(wire)
        exchange = self._unanswered[wire.id] = Exchange(wire.id, request.rest, request.id)
        try:
            if response := control(self._service, request):
                self._end(exchange, response)
            else:
                in_chunks = self._service.streams and request.accepts_chunks
                pending = self._service.submit(request, partial(self._send_chunk, exchange) if in_chunks else None)
                pending.add_done_callback(partial(self._end, exchange))
        except Exception as error:  # noqa: BLE001 (whatever the service raises)
            fault = logs.report(logger, error, f"request {request.id}: the service raised")
            self._send(exchange, exchange.failure(replace(_BROKEN, fault=fault)))

    def _send_chunk(self, exchange: Exchange, body: bytes, content_type: str, taken: Callable[[], None]) -> None:
        self._send(exchange, exchange.chunk(body, content_type), last=False)
        taken()  # TorchServe keeps what its client does not read, and tells nobody

    def _end(self, exchange: Exchange, response: ServiceResponse) -> None:
        self._send(exchange, exchange.last(response))

    def _send(self, exchange: Exchange, message: bytes, *, last: bool = True) -> None:
        with self._sending:
            if exchange.id not in self._unanswered:
                return
            try:
                self._link.sendall(message)
            except OSError:  # the guard has ended: `give_up` answers
                return
            if last:
                del self._unanswered[exchange.id]


def _receive(link: socket.socket) -> bytes:
    try:
        return link.recv(READ_BYTES)
    except ConnectionError:
        return b""
