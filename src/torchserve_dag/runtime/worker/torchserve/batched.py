"""Batched mode: TorchServe's batches are read from its socket, and each is answered as one message.

TorchServe's own loop (`ts/model_service_worker.py`) makes about forty system calls to read one request, which was half
of a worker's cost for a small request. `BatchedLoop` replaces it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

from torchserve_dag.runtime.compat.wire import (
    READ_BYTES,
    WireReader,
    WireRequest,
    WireResponse,
    read_requests,
)
from torchserve_dag.runtime.data.options import PIECES
from torchserve_dag.runtime.telemetry import metrics
from torchserve_dag.runtime.worker import output
from torchserve_dag.runtime.worker import service as services
from torchserve_dag.runtime.worker.protocol import PendingResponse, Service, ServiceResponse
from torchserve_dag.runtime.worker.torchserve import segments
from torchserve_dag.runtime.worker.torchserve.batch_messages import batch_messages
from torchserve_dag.runtime.worker.torchserve.exchange import wire_response
from torchserve_dag.runtime.worker.torchserve.rows import TorchServeRequest, control, read_request

logger = logging.getLogger(__name__)

PUBLISH_S = 1.0
"""How often a worker publishes its metrics."""
EXIT_HANGS = 70
"""The exit status of a worker in which a model hangs."""


class Context(Protocol):
    """The part of TorchServe's context that is used here."""

    system_properties: dict[str, Any]
    model_yaml_config: dict[str, Any]

    def get_request_id(self, idx: int = 0) -> str | None: ...
    def get_all_request_header(self, idx: int) -> dict[str, Any]: ...
    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None: ...
    def set_response_header(self, idx: int, key: str, value: str) -> None: ...


_loops: dict[Path, BatchedLoop] = {}
"""By the archive's folder: a worker serves one archive, which may contain others of ours as nodes."""


def handle(rows: list[dict[str, Any]] | None, context: Context) -> list[bytes]:
    """TorchServe's entry point. TorchServe calls it once without rows, to load."""
    folder = Path(context.system_properties["model_dir"])
    loop = _loops.get(folder) or _start(folder, context)
    return [] if rows is None else loop.handle(rows, context)


def _start(folder: Path, context: Context) -> BatchedLoop:
    """Load the model, and serve TorchServe's socket from now on."""
    socket_reader = _SocketReader.take_over()
    if socket_reader:
        output.take_over()
    is_segment = "segment" in json.loads((folder / "build.json").read_text("utf-8"))
    try:
        service = (segments.load if is_segment else services.load)(folder, context.system_properties.get("gpu_id"))
    except BaseException:
        output.hand_back()
        raise
    loop = _loops[folder] = BatchedLoop(service, controls=not is_segment)
    if socket_reader:
        socket_reader.serve = loop.run
    publish(service)
    threading.Thread(target=loop.end_when_it_hangs, name="end when it hangs", daemon=True).start()
    return loop


def publish(service: Service) -> None:
    """Print the service's metrics every second. Its gauges are told from other workers' by the number of its socket,
    which a worker that is started again has, too.
    """
    number = re.search(r"--(?:sock[-_]name|port)[= ]\S*?(\d+)(?: |$)", " ".join(sys.argv))
    worker = number[1] if number else str(os.getpid())
    read = service.metrics, output.command, service.gauges
    metrics.publish_every(PUBLISH_S, service.name, service.version, *read, worker)


class BatchedLoop:
    """Answers batches with a service, one after the other."""

    def __init__(self, service: Service, *, controls: bool = True) -> None:
        """`controls`: whether requests may cancel others and ask for a description; false in a `.war`."""
        self._service = service
        self._controls = controls
        self._closed = threading.Event()
        self._answering = threading.Lock()
        """Held while a batch is answered."""

    def run(self, connection: socket.socket) -> None:
        """Answer the batches that TorchServe sends, until TorchServe ends the connection."""
        batches: WireReader[list[WireRequest]] = WireReader(read_requests)
        with suppress(ConnectionError):
            while data := connection.recv(READ_BYTES):
                for batch, _ in batches.feed(data):
                    with self._answering:
                        streams = {wire.id for wire in batch if PIECES in wire.row}
                        for message in batch_messages(self.answer(batch), streams):
                            connection.sendall(message)

    def handle(self, rows: list[dict[str, Any]], context: Context) -> list[bytes]:
        """The body of each row's response, for a caller that has TorchServe's context instead of its socket."""
        batch = [
            WireRequest(context.get_request_id(i) or "", row, context.get_all_request_header(i))
            for i, row in enumerate(rows)
        ]
        with self._answering:
            responses = self.answer(batch)
        for i, response in enumerate(responses):
            context.set_response_status(response.status, response.phrase, i)
            for name, value in response.headers.items():
                context.set_response_header(i, name, value)
        return [response.body for response in responses]

    def answer(self, batch: Sequence[WireRequest]) -> list[WireResponse]:
        """The responses to a batch. All its requests are submitted before the first response is awaited."""
        requests = [read_request(wire) for wire in batch]
        with self._service.together():
            started = [self._start(request) for request in requests]
        patience_s = self._service.timeout_s + 5  # a service always answers by its time limit
        # A whole answer over gRPC must say that no more follows, or TorchServe's StreamPredictions ends the worker.
        return [
            wire_response(
                wire.id,
                response if isinstance(response, ServiceResponse) else response.result(patience_s),
                more=None if request.rest else False,
            )
            for wire, request, response in zip(batch, requests, started, strict=True)
        ]

    def _start(self, request: TorchServeRequest) -> ServiceResponse | PendingResponse:
        response = control(self._service, request) if self._controls else None
        return response or self._service.submit(request)

    def end_when_it_hangs(self) -> None:
        """A thread that hangs in a model cannot be ended; its process can, and TorchServe starts another."""
        if not hangs_before(self._closed, self._service):
            return
        self._answering.acquire()  # once its batch is answered, by the time limit
        time.sleep(0.2)  # so that the responses are sent
        os._exit(EXIT_HANGS)

    def close(self) -> None:
        self._closed.set()
        self._service.close()


def hangs_before(closed: threading.Event, service: Service) -> bool:
    """Wait until a model hangs, and return True; False if `closed` is set before."""
    while not service.hangs():
        if closed.wait(1):
            return False
    logger.error("a node of %s hangs: this worker ends", service.name)
    return True


class _SocketReader:
    """Replaces the function with which TorchServe's worker reads its socket. It never returns to the worker's loop."""

    serve: Callable[[socket.socket], None] | None = None
    """Answers on a connection until it is closed."""

    @classmethod
    def take_over(cls) -> _SocketReader | None:
        """Install the replacement. None in an archive that is a node of the worker's, and in an unknown TorchServe."""
        main = sys.modules["__main__"]
        read = getattr(main, "retrieve_msg", None)
        if read is None or isinstance(read, cls) or "--async" in sys.argv:
            return None
        reader = cls()
        vars(main)["retrieve_msg"] = reader
        return reader

    def __call__(self, connection: socket.socket) -> NoReturn:
        if self.serve is None:
            raise RuntimeError("the model is not loaded")
        self.serve(connection)
        sys.exit(0)
