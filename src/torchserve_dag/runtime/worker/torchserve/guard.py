"""The guard: a process that holds TorchServe's socket, and outlives the process that has the model.

TorchServe (0.12.0) does not survive the end of a worker in asynchronous mode: it leaves its requests unanswered,
sends the next request before the new worker's model is loaded, which ends the new worker too, loses that request, and
never reports the worker as ready again. So the process that TorchServe started does only what cannot fail. It starts a
**computing process**, passes messages between TorchServe and that process, and when that process ends, fails its
requests and starts another one. Until the model is loaded again the guard reads no requests, so they wait in
TorchServe's queue.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import NoReturn

from torchserve_dag.runtime.compat.wire import (
    READ_BYTES,
    ResponseHeads,
    WireReader,
    WireRequest,
    read_requests,
    read_response_heads,
    write_responses,
)
from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.worker.torchserve.exchange import Exchange
from torchserve_dag.runtime.worker.torchserve.rows import over_rest

logger = logging.getLogger(__name__)

LOADED = write_responses([])
"""The computing process's first message: its model is loaded. TorchServe's workers send it, too."""
HOLD = write_responses([], HTTPStatus.SERVICE_UNAVAILABLE)
"""The computing process's message before it ends itself: send no more requests. The guard then closes the link."""

DIED = Failure(
    HTTPStatus.INSUFFICIENT_STORAGE,  # TorchServe's status in batched mode
    "The worker ended while it had this request; another is being started. Try again.",
    "WorkerDied",
)

STARTS = 3
"""How many computing processes in a row may end before their model is loaded; then the worker ends."""

MAX_BUFFERED = 1 << 24
"""Bytes that may wait to be written to one side; beyond it, the other side is not read."""


class Guard:
    """Passes messages between TorchServe and a computing process. Raises RuntimeError if its model cannot be loaded."""

    def __init__(self, compute: Callable[[socket.socket], None], startup_s: float) -> None:
        """`compute` runs in the computing process; over its socket it speaks the protocol of TorchServe's workers."""
        self._compute = compute
        self._startup_s = startup_s
        self._connection: socket.socket | None = None
        self._requests: WireReader[list[WireRequest]] = WireReader(read_requests)
        self._to_torchserve = bytearray()
        self._unanswered: dict[str, Exchange] = {}
        """The unanswered requests, by TorchServe's id."""
        self._signals = _child_signals()
        self._start()
        while not self._loaded:
            if self._step():
                raise RuntimeError(self._why)

    def run(self, connection: socket.socket) -> NoReturn:
        """Serve TorchServe's connection until TorchServe ends it."""
        self._connection = connection
        connection.settimeout(0)
        self._hand_over(connection)
        starts = 0
        while True:
            if not self._step():
                continue
            starts = 1 if self._loaded else starts + 1
            self._fail_requests()
            if starts > STARTS:
                logger.error("the worker ends: its model cannot be loaded any more")
                self._flush()
                self._finish(1)
            self._start()

    # The computing process.

    def _start(self) -> None:
        self._link, theirs = socket.socketpair()
        self._link.settimeout(0)
        self._to_compute = bytearray()
        self._responses: WireReader[ResponseHeads] = WireReader(read_response_heads)
        self._loaded = self._open = self._held = False
        self._why = "the process ended"
        self._deadline = time.monotonic() + self._startup_s
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if not self._pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._link.close()
            self._become(theirs)
        theirs.close()

    def _become(self, link: socket.socket) -> NoReturn:
        try:
            self._compute(link)
        except BaseException as error:
            logger.exception("the worker's process ends")
            link.sendall(write_responses([], HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}"))
        finally:
            sys.stdout.flush()
            os._exit(1)  # the forked process must never return into TorchServe's own code

    def _hand_over(self, connection: socket.socket) -> None:
        """Pass the connection to the computing process too, which fails its requests over it if the guard ends."""
        socket.send_fds(self._link, [b"\0"], [connection.fileno()])
        self._open = True

    def _fail_requests(self) -> None:
        """After the end of the computing process: pass on the responses that it wrote, and fail its other requests."""
        while self._receive_responses():
            pass
        for exchange in self._unanswered.values():
            self._to_torchserve += exchange.failure(DIED)
        logger.error("the worker's process ended with %d unanswered requests", len(self._unanswered))
        self._unanswered.clear()
        self._link.close()

    # Between TorchServe and the computing process.

    def _step(self) -> bool:
        """Wait for messages, and pass them on. Returns whether the computing process has ended."""
        poll = select.poll()
        poll.register(self._signals, select.POLLIN)
        poll.register(self._link, self._wanted(self._to_compute, len(self._to_torchserve) < MAX_BUFFERED))
        if self._connection:
            readable = self._open and len(self._to_compute) < MAX_BUFFERED
            poll.register(self._connection, self._wanted(self._to_torchserve, readable) | select.POLLRDHUP)
        if not self._loaded and time.monotonic() > self._deadline:
            self._why = f"the model was not loaded within {self._startup_s:g} s"
            os.kill(self._pid, signal.SIGKILL)
        events = dict(poll.poll(None if self._loaded else 1000))
        if self._signals.fileno() in events and self._has_ended():
            return True
        if events.get(self._link.fileno(), 0) & select.POLLIN:
            self._receive_responses()
        if self._connection:
            happened = events.get(self._connection.fileno(), 0)
            if happened & (select.POLLRDHUP | select.POLLHUP | select.POLLERR):
                self._finish(0)
            if happened & select.POLLIN:
                self._receive_requests(self._connection)
            _write(self._connection, self._to_torchserve)
        _write(self._link, self._to_compute)
        if self._held and not self._to_compute:
            self._held = False
            self._link.shutdown(socket.SHUT_WR)
        return False

    def _has_ended(self) -> bool:
        """Whether the computing process is the one that has ended, which is then reaped."""
        _read(self._signals)
        pid, _ = os.waitpid(self._pid, os.WNOHANG)
        return pid == self._pid

    @staticmethod
    def _wanted(outgoing: bytearray, readable: bool) -> int:  # noqa: FBT001
        return (select.POLLIN if readable else 0) | (select.POLLOUT if outgoing else 0)

    def _receive_requests(self, connection: socket.socket) -> None:
        for requests, message in self._requests.feed(_read(connection)):
            for request in requests:
                self._unanswered[request.id] = Exchange(request.id, over_rest(request.headers), request.id)
            self._to_compute += message

    def _receive_responses(self) -> bool:
        """Read the computing process's responses. Returns whether there were any."""
        data = _read(self._link)
        for heads, message in self._responses.feed(data):
            if heads.more:
                self._to_torchserve += message
                for name, more in heads.more:
                    self._unanswered[name].began = True
                    if not more:
                        del self._unanswered[name]
            elif heads.code == HTTPStatus.OK:
                self._loaded = True
                if self._connection:
                    self._hand_over(self._connection)
            elif heads.code == HTTPStatus.SERVICE_UNAVAILABLE:
                self._open, self._held = False, True
            else:
                self._why = heads.message
        return bool(data)

    def _flush(self) -> None:
        if self._connection:
            self._connection.settimeout(5)
            self._connection.sendall(self._to_torchserve)

    def _finish(self, status: int) -> NoReturn:
        os.kill(self._pid, signal.SIGKILL)
        sys.exit(status)


def _child_signals() -> socket.socket:
    """A socket that is readable when a child of this process has ended. (Some container runtimes refuse a pidfd.)"""
    readable, written = socket.socketpair()
    for side in (readable, written):
        side.settimeout(0)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # ignored by default, and then nothing is written
    signal.set_wakeup_fd(written.detach(), warn_on_full_buffer=False)
    return readable


def _read(side: socket.socket) -> bytes:
    try:
        return side.recv(READ_BYTES)
    except (BlockingIOError, ConnectionError):
        return b""


def _write(side: socket.socket, outgoing: bytearray) -> None:
    if outgoing:
        try:
            del outgoing[: side.send(outgoing)]
        except BlockingIOError:
            return
        except ConnectionError:  # the other side has ended: `_step` will notice
            outgoing.clear()
