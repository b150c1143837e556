"""What TorchServe calls in a worker: rows of requests in, bodies and statuses out.

An archive is a project of its own (`handlers/`, `workflows/`, `weights/`) whose `build.json` says which
file is served.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from http import HTTPStatus
from http.client import responses
from pathlib import Path
from typing import Any, Protocol

from torchserve_dag import codec
from torchserve_dag.engine.graph import Graph
from torchserve_dag.engine.workflow import Workflow, read_graph
from torchserve_dag.messages import Failure
from torchserve_dag.project import Project
from torchserve_dag.segment import ABOUT_PART, FAILURE_PART, REQUEST_PART, segments, unseal

logger = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 6_553_500
"""TorchServe's default `max_response_size`: a larger answer ends the worker, and all that is inside it."""

BODY_KEYS = ("body", "data")
"""Where a request's body is: TorchServe calls a raw body `body`; its clients call a form's part `data`."""


_CANNOT_BE_WRITTEN = Failure(HTTPStatus.INTERNAL_SERVER_ERROR, "The answer cannot be written.", "InternalError")


class Context(Protocol):
    """The part of TorchServe's context that is used here."""

    system_properties: dict[str, Any]
    manifest: dict[str, Any]

    def get_request_header(self, idx: int, key: str) -> Any: ...
    def get_request_id(self, idx: int = 0) -> str | None: ...
    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None: ...
    def set_response_content_type(self, idx: int, value: str) -> None: ...
    def set_response_header(self, idx: int, key: str, value: str) -> None: ...


@dataclass(frozen=True, slots=True)
class _Incoming:
    """What a client sent."""

    body: bytes
    content_type: str | None
    parameters: dict[str, str]


class Service:
    """One worker's model: a workflow, and what its archive says about it."""

    def __init__(self, folder: Path, gpu: int | None) -> None:
        self.build = json.loads((folder / "build.json").read_text("utf-8"))
        project = Project(folder)
        graph = self.graph(read_graph(project, folder / self.build["file"]))
        self.workflow = Workflow(project, graph, gpu=gpu, workers=graph.serve.workers)
        self._answering = threading.Lock()

    def graph(self, whole: Graph) -> Graph:
        """What this worker runs of the archive's graph: all of it."""
        return whole

    def handle(self, rows: list[dict[str, Any]], context: Context) -> list[bytes]:
        """One body a row."""
        for i in range(len(rows)):
            if not context.get_request_header(i, "explain"):  # which TorchServe adds to every REST request
                # StreamPredictions ends the worker that gives it a whole answer without this.
                context.set_response_header(i, "ts_stream_next", "false")
        with self._answering:
            return self.answer(rows, context)

    def answer(self, rows: list[dict[str, Any]], context: Context) -> list[bytes]:
        """Every request of the batch is inside the workflow before the first is awaited."""
        futures = [
            None
            if context.get_request_header(i, "describe") == "True"
            else self._submit(_incoming(i, row, context), context.get_request_id(i))
            for i, row in enumerate(rows)
        ]
        return [self._body(i, future, context) if future else self.describe() for i, future in enumerate(futures)]

    def end_when_stuck(self) -> None:
        """A thread that hangs in a model cannot be ended; its process can, and TorchServe starts another."""
        while not self.workflow.stuck():
            if self.workflow.engine.closed:
                return
            time.sleep(1)
        logger.error("a node of %s hangs: this worker ends", self.workflow.graph.name)
        with self._answering:  # what is inside is answered first, at its time limit at the latest
            time.sleep(0.2)  # for the answers to leave
            os._exit(70)

    def _patience(self) -> float:
        return self.workflow.graph.serve.timeout_s + 5

    def describe(self) -> bytes:
        return json.dumps(self.build).encode()

    def _submit(self, one: _Incoming, request_id: str | None, known: dict[str, Any] | None = None) -> Future[Any]:
        return self.workflow.submit(
            one.body, one.parameters, content_type=one.content_type, request_id=request_id, known=known
        )

    def _body(self, index: int, future: Future[Any], context: Context) -> bytes:
        # The engine always answers, at the request's deadline at the latest.
        answer = future.result(self._patience())
        if not isinstance(answer, Failure):
            try:
                body, content_type = codec.encode(answer)
            except Exception:
                logger.exception("request %s: the answer cannot be written", context.get_request_id(index))
                answer = _CANNOT_BE_WRITTEN
            else:
                if len(body) <= MAX_ANSWER_BYTES:
                    context.set_response_content_type(index, content_type)
                    return body
                answer = _too_large(len(body))
        context.set_response_status(answer.status, responses.get(answer.status, "Failed"), index)
        context.set_response_content_type(index, "application/json")
        return json.dumps(codec.failure_fields(answer, context.get_request_id(index))).encode()


class SegmentService(Service):
    """One model of a `.war`: rows are envelopes, and every answer is one too, whatever became of it."""

    def graph(self, whole: Graph) -> Graph:
        self.segment = segments(whole)[self.build["segment"]]
        return self.segment.part()

    def answer(self, rows: list[dict[str, Any]], context: Context) -> list[bytes]:
        envelopes = [self._opened(i, row, context) for i, row in enumerate(rows)]
        futures = [
            None
            if FAILURE_PART in parts
            else self._submit(_from_parts(parts), context.get_request_id(i), self.segment.known_results(parts))
            for i, parts in enumerate(envelopes)
        ]
        return [
            self._sealed(parts, future.result(self._patience()) if future else codec.failure_in(parts[FAILURE_PART]))
            for parts, future in zip(envelopes, futures, strict=True)
        ]

    def _opened(self, index: int, row: dict[str, Any], context: Context) -> dict[str, bytes]:
        if self.segment.known:
            return unseal(row)
        one = _incoming(index, row, context)  # the client's own, whatever it looks like
        return {REQUEST_PART: one.body, ABOUT_PART: json.dumps([one.content_type, one.parameters]).encode()}

    def _sealed(self, parts: dict[str, bytes], result: Any) -> bytes:
        try:
            body = self.segment.seal(parts, result)
        except Exception:
            logger.exception("the result of %s cannot be written", self.segment.node)
            return self.segment.seal(parts, _CANNOT_BE_WRITTEN)
        return body if len(body) <= MAX_ANSWER_BYTES else self.segment.seal(parts, _too_large(len(body)))


def _too_large(size: int) -> Failure:
    message = f"The answer is {size:,} bytes; the limit is {MAX_ANSWER_BYTES:,}."
    return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, message, "AnswerTooLarge")


_services: dict[Path, Service] = {}
"""By folder: a worker serves one archive, and an archive may hold others of ours as its nodes."""


def handle(rows: list[dict[str, Any]] | None, context: Context) -> list[bytes]:
    """TorchServe's entry point. It calls it once with no rows, to load."""
    folder = Path(context.system_properties["model_dir"])
    service = _services.get(folder)
    if service is None:
        segment = "segment" in json.loads((folder / "build.json").read_text("utf-8"))
        kind = SegmentService if segment else Service
        service = _services[folder] = kind(folder, context.system_properties.get("gpu_id"))
        threading.Thread(target=service.end_when_stuck, name="end when stuck", daemon=True).start()
    if rows is None:
        return []
    return service.handle(rows, context)


def _incoming(index: int, row: dict[str, Any], context: Context) -> _Incoming:
    key = next((k for k in BODY_KEYS if k in row), None)
    if key is None and len(row) == 1:  # a gRPC client may call its one input as it likes
        key = next(iter(row))
    body = row.get(key, b"") if key else b""
    # A part's own type comes under its name, the request's under its header.
    part = context.get_request_header(index, key) if key else None
    return _Incoming(
        bytes(body) if isinstance(body, bytes | bytearray) else json.dumps(body).encode(),
        part.get("content-type") if isinstance(part, dict) else None,
        {k: _text(v) for k, v in row.items() if k != key},
    )


def _from_parts(parts: dict[str, bytes]) -> _Incoming:
    return _Incoming(parts[REQUEST_PART], *json.loads(parts[ABOUT_PART]))


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes | bytearray) else str(value)
