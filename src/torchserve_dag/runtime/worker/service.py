"""What TorchServe calls in a worker: rows of requests in, bodies and statuses out.

An archive is a project of its own (`handlers/`, `workflows/`, `weights/`) whose `build.json` says which
file is served. This is batched mode; the other is in `asynchronous.py`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

from torchserve_dag.runtime.compat.runner import Row
from torchserve_dag.runtime.data import codec
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.graph.torchserve.nodes import takes_rows
from torchserve_dag.runtime.graph.torchserve.segment import ABOUT_PART, FAILURE_PART, REQUEST_PART, segments, unseal
from torchserve_dag.runtime.messages import Failure, InputError
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.telemetry import metrics, scores
from torchserve_dag.runtime.worker.incoming import Incoming, over_rest, read_incoming
from torchserve_dag.runtime.worker.reply import CANNOT_BE_WRITTEN, MAX_BYTES, Reply, joined, reply, too_large
from torchserve_dag.runtime.worker.torchserve import sharing
from torchserve_dag.runtime.worker.torchserve.wire import (
    CHUNK,
    NEXT,
    Asked,
    Messages,
    Told,
    read_requests,
    write_answers,
)
from torchserve_dag.runtime.workflow import Workflow

logger = logging.getLogger(__name__)

PUBLISH_S = 1.0
"""How often a worker publishes what its nodes have done."""
STUCK = 70
"""What a worker that hangs ends with."""


class Context(Protocol):
    """The part of TorchServe's context that is used here."""

    system_properties: dict[str, Any]
    model_yaml_config: dict[str, Any]

    def get_request_id(self, idx: int = 0) -> str | None: ...
    def get_all_request_header(self, idx: int) -> dict[str, Any]: ...
    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None: ...
    def set_response_header(self, idx: int, key: str, value: str) -> None: ...


class Service:
    """One worker's model: a workflow, and what its archive says about it."""

    def __init__(self, folder: Path, gpu: int | None) -> None:
        self.build = json.loads((folder / "build.json").read_text("utf-8"))
        project = Project(folder)
        graph = self.graph(read_graph(project, folder / self.build["file"]))
        self.workflow = Workflow(project, graph, gpu=gpu, workers=graph.serve.workers)
        self._takes_rows = takes_rows(graph)
        self._score = graph.serve.score
        self._handling = threading.Lock()
        self._answering = [self._handling]
        """For `handle`, and one for each of TorchServe's connections; held while a batch is answered."""

    def graph(self, whole: Graph) -> Graph:
        """What this worker runs of the archive's graph: all of it."""
        return whole

    def publish(self) -> None:
        """Publish from now on what its nodes have done."""
        graph = self.workflow.graph
        metrics.publish_every(PUBLISH_S, graph.name, graph.version, self.workflow.counts)

    def ask(self, one: Incoming, on_piece: Callable[[Any], None] | None = None) -> Future[Any]:
        """What answers a request: a message, a list of pieces, or a Failure."""
        if one.describes:
            return _known(self.build)
        if one.cancels is not None:
            return _known({"cancelled": self.workflow.engine.cancel(one.cancels)})
        try:
            options = one.options()
        except InputError as error:
            return _known(Failure(error.status, error.message))
        body = Row.received(one.parts, one.headers) if self._takes_rows else one.body
        return self.workflow.submit(
            body,
            one.parameters,
            content_type=one.content_type,
            request_id=one.id,
            options=options,
            on_piece=on_piece,
        ).future

    def reply(self, one: Incoming, answer: Any) -> Reply:
        """A whole answer as it leaves."""
        if self._score and not isinstance(answer, Failure):
            graph = self.workflow.graph
            scores.note(graph.name, graph.version, one.id, scores.score_in(answer, self._score))
        in_pieces = self.workflow.graph.streams and isinstance(answer, list)
        return joined(answer, one.id) if in_pieces else reply(answer, one.id)

    def run(self, connection: socket.socket) -> None:
        """Answer the batches that TorchServe sends, until it ends the connection."""
        batches: Messages[list[Asked]] = Messages(read_requests)
        answering = threading.Lock()
        self._answering.append(answering)
        with suppress(ConnectionError):
            while data := connection.recv(CHUNK):
                for asked, _ in batches.of(data):
                    with answering:
                        connection.sendall(write_answers(self.answer(asked)))
        self._answering.remove(answering)

    def handle(self, rows: list[dict[str, Any]], context: Context) -> list[bytes]:
        """One body a row, for who has TorchServe's context instead of its socket."""
        asked = [
            Asked(context.get_request_id(i) or "", row, context.get_all_request_header(i)) for i, row in enumerate(rows)
        ]
        with self._handling:
            told = self.answer(asked)
        for i, one in enumerate(told):
            context.set_response_status(one.status, one.phrase, i)
            for name, value in one.headers.items():
                context.set_response_header(i, name, value)
        return [one.body for one in told]

    def answer(self, batch: Sequence[Asked]) -> list[Told]:
        """Every request of the batch is inside the workflow before the first is awaited."""
        requests = [read_incoming(asked.id, asked.row, asked.headers) for asked in batch]
        with self.workflow.engine.together():
            futures = [self.ask(one) for one in requests]
        return [
            self._told(asked.id, one.rest, self.reply(one, future.result(self._patience())))
            for asked, one, future in zip(batch, requests, futures, strict=True)
        ]

    def _told(self, name: str, rest: bool, found: Reply) -> Told:  # noqa: FBT001
        headers = {"content-type": found.content_type, **found.headers}
        if not rest:
            headers[NEXT] = "false"  # StreamPredictions ends the worker that gives it a whole answer without this
        return Told(name, found.status, found.phrase, found.content_type, headers, found.body)

    def end_when_stuck(self) -> None:
        """A thread that hangs in a model cannot be ended; its process can, and TorchServe starts another."""
        if not self.gets_stuck():
            return
        for answering in tuple(self._answering):  # what is inside is answered first, at its time limit at the latest
            answering.acquire()
        time.sleep(0.2)  # for the answers to leave
        os._exit(STUCK)

    def gets_stuck(self) -> bool:
        """Waits until a node hangs, and is true; false where the workflow is closed before."""
        while not self.workflow.stuck():
            if self.workflow.engine.over:
                return False
            time.sleep(1)
        logger.error("a node of %s hangs: this worker ends", self.workflow.graph.name)
        return True

    def _patience(self) -> float:
        # The engine always answers, at the request's deadline at the latest.
        return self.workflow.graph.serve.timeout_s + 5


class SegmentService(Service):
    """One model of a `.war`: rows are envelopes, and every answer is one too, whatever became of it."""

    def graph(self, whole: Graph) -> Graph:
        self.segment = segments(whole)[self.build["segment"]]
        return self.segment.part()

    def answer(self, batch: Sequence[Asked]) -> list[Told]:
        envelopes = [self._opened(asked) for asked in batch]
        with self.workflow.engine.together():
            futures = [
                None if FAILURE_PART in parts else self._submit(parts, asked.id)
                for asked, parts in zip(batch, envelopes, strict=True)
            ]
        results = [
            future.result(self._patience()) if future else codec.failure_in(parts[FAILURE_PART])
            for parts, future in zip(envelopes, futures, strict=True)
        ]
        return [
            self._told(asked.id, over_rest(asked.headers), Reply(self._sealed(parts, result)))
            for asked, parts, result in zip(batch, envelopes, results, strict=True)
        ]

    def _submit(self, parts: dict[str, bytes], request_id: str) -> Future[Any]:
        content_type, parameters = json.loads(parts[ABOUT_PART])
        return self.workflow.submit(
            parts[REQUEST_PART],
            parameters,
            content_type=content_type,
            request_id=request_id,
            known=self.segment.known_results(parts),
        ).future

    def _opened(self, asked: Asked) -> dict[str, bytes]:
        if self.segment.known:
            return unseal(asked.row)
        one = read_incoming(asked.id, asked.row, asked.headers)  # the client's own, whatever it looks like
        return {REQUEST_PART: one.body, ABOUT_PART: json.dumps([one.content_type, one.parameters]).encode()}

    def _sealed(self, parts: dict[str, bytes], result: Any) -> bytes:
        try:
            body = self.segment.seal(parts, result)
        except Exception:
            logger.exception("the result of %s cannot be written", self.segment.node)
            return self.segment.seal(parts, CANNOT_BE_WRITTEN)
        return body if len(body) <= MAX_BYTES else self.segment.seal(parts, too_large(len(body)))


_services: dict[Path, Service] = {}
"""By folder: a worker serves one archive, and an archive may hold others of ours as its nodes."""


def handle(rows: list[dict[str, Any]] | None, context: Context) -> list[bytes]:
    """TorchServe's entry point. It calls it once with no rows, to load."""
    folder = Path(context.system_properties["model_dir"])
    service = _services.get(folder)
    if service is None:
        loop = _Loop.take_over()
        build = json.loads((folder / "build.json").read_text("utf-8"))
        host: sharing.Host | None = None
        if loop and "hosts" in build:
            joined_as = sharing.join(folder, build["hosts"], context.model_yaml_config["startupTimeout"])
            if isinstance(joined_as, sharing.Guest):
                loop.serve = joined_as.hand_over
                return []
            host = joined_as
        kind = SegmentService if "segment" in build else Service
        service = _services[folder] = kind(folder, context.system_properties.get("gpu_id"))
        if loop:
            loop.serve = service.run
        if host:
            host.open(service.run)
        service.publish()
        threading.Thread(target=service.end_when_stuck, name="end when stuck", daemon=True).start()
    return service.handle(rows, context) if rows is not None else []


class _Loop:
    """Stands in for what TorchServe's worker reads its socket with, and answers what it reads.

    TorchServe's own loop (`ts/model_service_worker.py`) makes about forty calls of the system to read one request, and
    half of what a small request cost a worker was this.
    """

    serve: Callable[[socket.socket], None] | None = None
    """What answers on a connection until it ends."""

    @classmethod
    def take_over(cls) -> _Loop | None:
        """In the worker's own archive; none in one that is a node of another, or where TorchServe is another one."""
        main = sys.modules["__main__"]
        read = getattr(main, "retrieve_msg", None)
        if read is None or isinstance(read, cls) or "--async" in sys.argv:
            return None
        loop = cls()
        vars(main)["retrieve_msg"] = loop
        return loop

    def __call__(self, connection: socket.socket) -> NoReturn:
        if self.serve is None:
            raise RuntimeError("the model is not loaded")
        self.serve(connection)
        sys.exit(0)


def _known(answer: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(answer)
    return future
