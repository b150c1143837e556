"""Asynchronous mode: every request is answered when it is ready, in pieces where its answer has pieces.

TorchServe starts such a worker with `--async`, and there reads and writes its socket with `ts/async_service.py`, which
writes from two threads without a lock, and prints a line and copies its whole context for each request. Here
`guard.py` stands in its place; what this file does runs in the process that the guard starts.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import threading
import time
from concurrent.futures import Future
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn

from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.worker import service
from torchserve_dag.runtime.worker.incoming import Incoming, read_incoming
from torchserve_dag.runtime.worker.reply import piece
from torchserve_dag.runtime.worker.service import STUCK, Context, Service
from torchserve_dag.runtime.worker.torchserve.call import Call
from torchserve_dag.runtime.worker.torchserve.guard import DIED, HOLD, LOADED, Guard
from torchserve_dag.runtime.worker.torchserve.wire import CHUNK, Asked, Messages, read_requests

logger = logging.getLogger(__name__)

LOG = "workers_without_guard.log"

GIVE_UP_S = 5
"""How long TorchServe may take to read the failures of what was inside."""

_BROKEN = Failure(HTTPStatus.INTERNAL_SERVER_ERROR, "The worker failed; its log says why.", "InternalError")


def handle(rows: list[dict[str, Any]] | None, context: Context) -> list[bytes]:
    """TorchServe's entry point. In asynchronous mode it calls it once, with no rows, to load."""
    main = sys.modules["__main__"]
    if rows is not None or "--async" not in sys.argv or not hasattr(main, "AsyncService"):
        return service.handle(rows, context)  # in batched mode after all, or as a node of another archive
    folder, gpu = Path(context.system_properties["model_dir"]), context.system_properties.get("gpu_id")
    vars(main).pop("AsyncService")  # so that an archive that is a node of this one is not taken for it
    vars(main)["AsyncService"] = _StandIn(_guard(folder, gpu, context.model_yaml_config["startupTimeout"]))
    return []


class _StandIn:
    """What TorchServe's worker calls when the model is loaded: `AsyncService(service).run()`."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def __call__(self, served: Any) -> _StandIn:
        self._connection = served.cl_socket
        return self

    def run(self) -> NoReturn:
        self._guard.run(self._connection)


def _guard(folder: Path, gpu: int | None, startup_s: float) -> Guard:
    """Raises RuntimeError where the model cannot be loaded."""
    return Guard(partial(_serve, folder, gpu, startup_s), startup_s)


def _serve(folder: Path, gpu: int | None, startup_s: float, link: socket.socket) -> NoReturn:
    """Load, and answer what comes over the link; when the guard has ended, take its place."""
    loaded = threading.Event()
    threading.Thread(target=_end_with_guard, args=(link, loaded), daemon=True).start()
    served = Service(folder, gpu)
    loaded.set()
    link.sendall(LOADED)
    print(f"[PID]{os.getpid()}", flush=True)  # noqa: T201 (how TorchServe learns which process to show)
    served.publish()  # after that line, which a line of another thread would tear
    _, (connection, *_), *_ = socket.recv_fds(link, 1, 1)
    answering = Answering(served, link)
    threading.Thread(target=answering.end_when_stuck, name="end when stuck", daemon=True).start()
    answering.run()
    if answering.holding:
        answering.drain()
        os._exit(STUCK)
    torchserve = socket.socket(fileno=connection)
    if _hung_up(torchserve, 0):
        os._exit(0)
    answering.give_up(torchserve)
    torchserve.set_inheritable(True)
    _start_afresh(str(folder), "" if gpu is None else str(gpu), str(startup_s), str(connection))


def _start_afresh(*arguments: str) -> NoReturn:
    """Become a guard, as a program without threads, which may start processes of its own."""
    # TorchServe reads what a worker prints no longer than the process that it started lives.
    log = os.open(Path(os.environ.get("LOG_LOCATION", ".")) / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torchserve_dag.runtime.worker.torchserve.asynchronous", *arguments]
    os.execve(sys.executable, command, environment)  # noqa: S606


def _end_with_guard(link: socket.socket, loaded: threading.Event) -> None:
    """A model that is still being loaded is of no use to anybody when the guard has ended."""
    while not loaded.is_set():
        if _hung_up(link, 1000) and not loaded.is_set():
            os._exit(1)


def _hung_up(side: socket.socket, wait_ms: int) -> bool:
    poll = select.poll()
    poll.register(side, select.POLLRDHUP)
    return bool(poll.poll(wait_ms))


class Answering:
    """Answers what comes over a socket with a service."""

    def __init__(self, served: Service, link: socket.socket) -> None:
        self._service = served
        self._link = link
        self._sending = threading.Lock()
        self._inside: dict[str, Call] = {}
        self.holding = False
        """Whether it has asked for no more requests: the other side then ends after the last."""

    def run(self) -> None:
        """Until the other side ends."""
        messages: Messages[list[Asked]] = Messages(read_requests)
        while data := _receive(self._link):
            for asked, _ in messages.of(data):
                for one in asked:
                    self._begin(one)

    def end_when_stuck(self) -> None:
        """As in batched mode. New requests are kept away first; what is inside is answered at its time limit."""
        if self._service.gets_stuck():
            self.holding = True
            with self._sending:
                self._link.sendall(HOLD)

    def drain(self) -> None:
        """Wait until what is inside is answered."""
        deadline = time.monotonic() + self._service.workflow.graph.serve.timeout_s + 1
        while self._inside and time.monotonic() < deadline:
            time.sleep(0.1)

    def give_up(self, connection: socket.socket) -> None:
        """Fail what is inside, over TorchServe's own connection."""
        connection.settimeout(GIVE_UP_S)
        with self._sending:
            calls, self._inside = self._inside, {}
            for call in calls.values():
                connection.sendall(call.failure(DIED))

    def _begin(self, asked: Asked) -> None:
        one = read_incoming(asked.id, asked.row, asked.headers)
        call = self._inside[asked.id] = Call(asked.id, one.rest, one.id or asked.id)
        in_pieces = self._service.workflow.graph.streams and one.takes_pieces
        try:
            future = self._service.ask(one, partial(self._piece, call) if in_pieces else None)
        except Exception:
            logger.exception("request %s: it could not be put in", one.id)
            self._send(call, call.failure(_BROKEN))
        else:
            future.add_done_callback(partial(self._end, one, call))

    def _piece(self, call: Call, message: Any) -> None:
        found = piece(message)
        if found.body:  # over gRPC an empty message ends the answer
            self._send(call, call.piece(found), last=False)

    def _end(self, one: Incoming, call: Call, future: Future[Any]) -> None:
        answer = future.result()
        if not call.began:
            message = call.last(self._service.reply(one, answer))
        elif isinstance(answer, Failure):
            message = call.failure(answer)
        else:
            message = call.end()
        self._send(call, message)

    def _send(self, call: Call, message: bytes, *, last: bool = True) -> None:
        with self._sending:
            if call.id not in self._inside:
                return
            try:
                self._link.sendall(message)
            except OSError:  # the guard has ended, and the call is given up
                return
            if last:
                del self._inside[call.id]


def _receive(link: socket.socket) -> bytes:
    try:
        return link.recv(CHUNK)
    except ConnectionError:
        return b""


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
    logger.error("%s: the worker's guard has ended; this process takes its place", time.strftime("%Y-%m-%dT%H:%M:%S"))
    _folder, _gpu, _startup_s, _connection = sys.argv[1:]
    _guard(Path(_folder), int(_gpu) if _gpu else None, float(_startup_s)).run(socket.socket(fileno=int(_connection)))
