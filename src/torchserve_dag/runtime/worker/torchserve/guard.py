"""The process that holds TorchServe's socket while another one computes, and lives through that one's end.

TorchServe (0.12.0) does not survive the end of a worker in asynchronous mode: it answers none of the requests inside,
sends the next one before the new worker's model is loaded and so ends that one too, loses that request, and never
calls the worker ready again. So the process that it started does nothing that can fail. It starts the one that
computes, passes messages between the two, and when that one ends, answers for it and starts another. Meanwhile it
reads nothing, and requests wait with TorchServe.
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

from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.worker.incoming import over_rest
from torchserve_dag.runtime.worker.torchserve.call import Call
from torchserve_dag.runtime.worker.torchserve.wire import (
    CHUNK,
    Answers,
    Asked,
    Messages,
    read_answers,
    read_requests,
    write_answers,
)

logger = logging.getLogger(__name__)

LOADED = write_answers([])
"""What the one that computes says first, as a worker does to TorchServe."""
HOLD = write_answers([], HTTPStatus.SERVICE_UNAVAILABLE)
"""What it says before it ends by itself: no more requests, please. Its link is ended after the last."""

DIED = Failure(
    HTTPStatus.INSUFFICIENT_STORAGE,  # as TorchServe says in batched mode
    "The worker ended with this request inside; another is being started. Try again.",
    "WorkerDied",
)

STARTS = 3
"""How often one that ends before its model is loaded is started."""

FULL = 1 << 24
"""Bytes that may wait to be written to one side before the other is no longer read."""


class Guard:
    """Raises RuntimeError where the model cannot be loaded."""

    def __init__(self, compute: Callable[[socket.socket], None], startup_s: float) -> None:
        """`compute` runs in a process of its own, and speaks on a socket as TorchServe's workers do."""
        self._compute = compute
        self._startup_s = startup_s
        self._connection: socket.socket | None = None
        self._asked: Messages[list[Asked]] = Messages(read_requests)
        self._to_torchserve = bytearray()
        self._calls: dict[str, Call] = {}
        """What is inside."""
        self._start()
        while not self._loaded:
            if self._step():
                raise RuntimeError(self._why)

    def run(self, connection: socket.socket) -> NoReturn:
        """Serve TorchServe's connection until TorchServe ends it."""
        self._connection = connection
        connection.settimeout(0)
        self._hand_over(connection)
        tries = 0
        while True:
            if not self._step():
                continue
            tries = 1 if self._loaded else tries + 1
            self._answer_for_it()
            if tries > STARTS:
                logger.error("the worker ends: its model cannot be loaded any more")
                self._flush()
                self._finish(1)
            self._start()

    # The process that computes.

    def _start(self) -> None:
        self._link, theirs = socket.socketpair()
        self._link.settimeout(0)
        self._to_compute = bytearray()
        self._answers: Messages[Answers] = Messages(read_answers)
        self._loaded = self._open = self._held = False
        self._why = "the process ended"
        self._deadline = time.monotonic() + self._startup_s
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if not self._pid:
            self._link.close()
            self._become(theirs)
        theirs.close()
        self._end = os.pidfd_open(self._pid)

    def _become(self, link: socket.socket) -> NoReturn:
        try:
            self._compute(link)
        except BaseException as error:
            logger.exception("the worker's process ends")
            link.sendall(write_answers([], HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}"))
        finally:
            sys.stdout.flush()
            os._exit(1)  # never back into TorchServe's own code

    def _hand_over(self, connection: socket.socket) -> None:
        """The other process keeps the connection open, should this one end."""
        socket.send_fds(self._link, [b"\0"], [connection.fileno()])
        self._open = True

    def _answer_for_it(self) -> None:
        """The process has ended: what it has said still counts, and the rest is answered here."""
        while self._receive_answers():
            pass
        for call in self._calls.values():
            self._to_torchserve += call.failure(DIED)
        logger.error("the worker's process ended with %d requests inside", len(self._calls))
        self._calls.clear()
        os.waitpid(self._pid, 0)
        os.close(self._end)
        self._link.close()

    # Between the two.

    def _step(self) -> bool:
        """Wait, and pass on what there is; whether the process has ended."""
        poll = select.poll()
        poll.register(self._end, select.POLLIN)
        poll.register(self._link, self._wanted(self._to_compute, len(self._to_torchserve) < FULL))
        if self._connection:
            readable = self._open and len(self._to_compute) < FULL
            poll.register(self._connection, self._wanted(self._to_torchserve, readable) | select.POLLRDHUP)
        if not self._loaded and time.monotonic() > self._deadline:
            self._why = f"the model was not loaded within {self._startup_s:g} s"
            os.kill(self._pid, signal.SIGKILL)
        events = dict(poll.poll(None if self._loaded else 1000))
        if self._end in events:
            return True
        if events.get(self._link.fileno(), 0) & select.POLLIN:
            self._receive_answers()
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

    @staticmethod
    def _wanted(outgoing: bytearray, readable: bool) -> int:  # noqa: FBT001
        return (select.POLLIN if readable else 0) | (select.POLLOUT if outgoing else 0)

    def _receive_requests(self, connection: socket.socket) -> None:
        for asked, message in self._asked.of(_read(connection)):
            for one in asked:
                self._calls[one.id] = Call(one.id, over_rest(one.headers), one.id)
            self._to_compute += message

    def _receive_answers(self) -> bool:
        """Whether there were any."""
        data = _read(self._link)
        for answers, message in self._answers.of(data):
            if answers.more:
                self._to_torchserve += message
                for name, more in answers.more:
                    self._calls[name].began = True
                    if not more:
                        del self._calls[name]
            elif answers.code == HTTPStatus.OK:
                self._loaded = True
                if self._connection:
                    self._hand_over(self._connection)
            elif answers.code == HTTPStatus.SERVICE_UNAVAILABLE:
                self._open, self._held = False, True
            else:
                self._why = answers.message
        return bool(data)

    def _flush(self) -> None:
        if self._connection:
            self._connection.settimeout(5)
            self._connection.sendall(self._to_torchserve)

    def _finish(self, status: int) -> NoReturn:
        os.kill(self._pid, signal.SIGKILL)
        sys.exit(status)


def _read(side: socket.socket) -> bytes:
    try:
        return side.recv(CHUNK)
    except (BlockingIOError, ConnectionError):
        return b""


def _write(side: socket.socket, outgoing: bytearray) -> None:
    if outgoing:
        try:
            del outgoing[: side.send(outgoing)]
        except BlockingIOError:
            return
        except ConnectionError:  # what is at the other side has ended, and is noticed where it is waited for
            outgoing.clear()
