"""A request in, a response out, for any host: the model of an unpacked archive behind the protocol of `protocol.py`.

An archive is a project of its own (`handlers/`, `workflows/`, `weights/`) whose `build.json` says which file is
served.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from torchserve_dag.runtime.compat.rows import Row
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.codec import content_type_of
from torchserve_dag.runtime.data.media import FORM, media_of
from torchserve_dag.runtime.data.options import OUTPUTS, TOKEN, WITH_USAGE, read_options
from torchserve_dag.runtime.data.parts import Body, Parts, message_in
from torchserve_dag.runtime.engine.request import Request
from torchserve_dag.runtime.graph.graph import PARAMETERS, REQUEST, Graph
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.graph.torchserve.nodes import takes_rows
from torchserve_dag.runtime.messages import Failure, InputError, Usage
from torchserve_dag.runtime.models.load import Reuse
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.project.requirements import differences
from torchserve_dag.runtime.telemetry import scores
from torchserve_dag.runtime.telemetry.conversations import conversations_of
from torchserve_dag.runtime.telemetry.series import gauges_of, series_of, workflow_series
from torchserve_dag.runtime.worker.protocol import (
    Metrics,
    OnChunk,
    PendingResponse,
    ServiceRequest,
    ServiceResponse,
)
from torchserve_dag.runtime.worker.response import (
    JSON_LINES,
    usage_line,
    write_answer,
    write_chunk,
    write_failure_after_chunks,
    write_joined,
)
from torchserve_dag.runtime.worker.row import row_of
from torchserve_dag.runtime.workflow import Workflow

logger = logging.getLogger(__name__)


def load(folder: Path, gpu: int | None) -> WorkflowService:
    """What a host calls to load an archive. Raises CheckError, ValueError, and whatever a handler's `load` raises."""
    project, graph, build = read_archive(folder)
    return WorkflowService(project, graph, build, gpu)


def read_archive(folder: Path) -> tuple[Project, Graph, dict[str, Any]]:
    """An unpacked archive: its folder as a project, its graph, its `build.json`. Raises CheckError, ValueError."""
    build: dict[str, Any] = json.loads((folder / "build.json").read_text("utf-8"))
    project = Project(folder)
    graph = read_graph(project, folder / build["file"])
    for sentence in differences(graph.all_requirements, build.get("inputs", {}).get("packages", {})):
        logger.warning("%s %s: %s", graph.name, graph.version, sentence)
    return project, graph, build


class WorkflowService:
    """The Service of a workflow, or of a handler as a workflow of one node."""

    def __init__(
        self, project: Project, whole: Graph, build: dict[str, Any], gpu: int | None, reuse: Reuse | None = None
    ) -> None:
        """Load a project's graph. `build` is what the service says of itself; `reuse`: see Workflow."""
        self._build = build
        graph = self._graph_to_run(whole)
        self._kept = conversations_of(graph)
        keep = self._kept.keep if self._kept else None
        self._workflow = Workflow(project, graph, gpu=gpu, workers=graph.serve.workers, reuse=reuse, keep=keep)
        self._takes = graph.request
        self._takes_rows = takes_rows(graph)
        self.name, self.version = graph.name, graph.version
        self.timeout_s: float = graph.serve.timeout_s
        self.streams = graph.streams
        self._score = graph.serve.score

    def _graph_to_run(self, graph: Graph) -> Graph:
        """The part of the archive's graph that this service runs: all of it, except in a segment."""
        return graph

    def describe(self) -> Mapping[str, Any]:
        return self._build

    def submit(self, request: ServiceRequest, on_chunk: OnChunk | None = None) -> PendingResponse:
        in_lines = WITH_USAGE in request.options
        pending = Pending(partial(self._respond, request), on_chunk, in_lines=in_lines)
        try:
            options = read_options(request.options)
            message, parameters = self._read(request)
        except InputError as error:
            return pending.refused(Failure(error.status, error.message))
        running = self._workflow.engine.submit(
            message,
            parameters,
            request_id=request.id,
            options=options,
            on_chunk=pending.send_chunk if on_chunk and self.streams else None,
        )
        return pending.follow(running)

    def _read(self, request: ServiceRequest) -> tuple[Body | Parts | Row, Mapping[str, str]]:
        """What the client sent, as the workflow decodes it, and the parameters beside it. Raises InputError."""
        if self._takes_rows:
            return row_of(request), request.parameters
        if request.parts is None:
            return Body(request.body, request.content_type, request.content_encoding), request.parameters
        if media_of(request.content_type) == FORM:
            raise InputError(_TAKEN_APART.format(content_type_of(self._takes)), HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        if request.repeated:
            raise InputError(f"The form has several parts called {request.repeated[0][:40]}: send one.")
        parts = {part.name: Body(part.content, part.content_type) for part in request.parts}
        message, parameters = message_in(self._takes, parts)
        return message, {**request.parameters, **parameters}

    def together(self) -> AbstractContextManager[None]:
        return self._workflow.engine.together()

    def cancel(self, key: str) -> bool:
        return self._workflow.engine.cancel(key)

    def metrics(self) -> Metrics:
        counts, whole = self._workflow.counts(), self._workflow.engine.workflow_counts()
        kept = self._kept.counts() if self._kept else None
        return {
            **series_of(counts, self._workflow.own_engines),
            **workflow_series(self._workflow.graph, whole, counts, kept),
        }

    def gauges(self) -> Metrics:
        return gauges_of(self._workflow.own_engines, self._workflow.engine.queued())

    def hangs(self) -> bool:
        return self._workflow.hangs()

    def close(self) -> None:
        self._workflow.close()
        if self._kept:
            self._kept.close()

    def _respond(
        self,
        request: ServiceRequest,
        answer: Any,
        usage: Usage,
        after_chunks: bool,  # noqa: FBT001
    ) -> ServiceResponse:
        """The response for what the workflow answered: a message, a list of chunks, or a Failure."""
        with_usage = WITH_USAGE in request.options
        if after_chunks:
            if isinstance(answer, Failure):
                return write_failure_after_chunks(answer, request.id)
            return ServiceResponse(usage_line(usage), JSON_LINES) if with_usage else _NOTHING_LEFT
        if self._score and not isinstance(answer, Failure):
            score, token = scores.score_in(answer, self._score), request.options.get(TOKEN)
            scores.log_score(self.name, self.version, request.id, score, token)
        if self.streams and isinstance(answer, list):
            joined = write_joined(answer, request.id, self._named, in_lines=with_usage)
            whole = with_usage and joined.status == HTTPStatus.OK
            return replace(joined, body=joined.body + usage_line(usage)) if whole else joined
        named = _by_key if OUTPUTS in request.options else self._named
        response = write_answer(answer, request.id, named)
        headers = {**response.headers, WITH_USAGE: plain.to_json(usage).decode()}
        return replace(response, headers=headers) if with_usage else response

    def _named(self, path: plain.Path) -> tuple[plain.Path, str | None]:
        """What a part of the workflow's own answer is called, and the node that gave it."""
        values = self._workflow.graph.output.values
        whole = values.get("")
        value = whole or (values.get(str(path[0])) if path else None)
        nodes = sorted(value.names - {REQUEST, PARAMETERS}) if value else []
        return (whole.text.strip(), *path) if whole else path, nodes[0] if len(nodes) == 1 else None


def _by_key(path: plain.Path) -> tuple[plain.Path, str | None]:
    """As `_named`, of an answer that consists of the nodes that a client asked for."""
    return path, str(path[0]) if path else None


_NOTHING_LEFT = ServiceResponse(b"")
_TAKEN_APART = (
    f"TorchServe took the body apart, because its content type is {FORM}, which curl and others send unless told "
    "otherwise: send Content-Type: {}, or call the front door."
)


class Pending:
    """A PendingResponse, once `follow` or `refused` was called: `send_chunk` must exist before the request does.

    The answer is encoded by the thread that waits for it, or by the thread that finishes it.
    """

    __slots__ = ("_after_chunks", "_cancel", "_future", "_in_lines", "_on_chunk", "_respond", "_running")

    _future: Future[Any]
    _cancel: Callable[[], None]

    def __init__(
        self,
        respond: Callable[[Any, Usage, bool], ServiceResponse],
        on_chunk: OnChunk | None = None,
        *,
        in_lines: bool = False,
    ) -> None:
        """`respond` makes a response from an answer, its usage, and whether chunks have been sent.

        `in_lines`: texts are lines of JSON, too.
        """
        self._respond, self._on_chunk, self._in_lines = respond, on_chunk, in_lines
        self._after_chunks = False
        self._running: Request | None = None

    def follow(self, running: Request) -> Pending:
        """Take the response from a request in the engine."""
        self._running, self._future, self._cancel = running, running.future, running.cancel
        return self

    def refused(self, failure: Failure) -> Pending:
        """Answer with a failure, without the engine."""
        self._future, self._cancel = Future(), _do_nothing
        self._future.set_result(failure)
        return self

    def send_chunk(self, message: Any, taken: Callable[[], None]) -> int:
        """Send a chunk to the host, which calls `taken`. Returns the chunk's size in bytes."""
        body, content_type = write_chunk(message, in_lines=self._in_lines)
        if body and self._on_chunk:
            self._after_chunks = True
            self._on_chunk(body, content_type, taken)
        else:  # an empty chunk would end the answer, in HTTP and in TorchServe's gRPC alike
            taken()
        return len(body)

    def result(self, timeout_s: float) -> ServiceResponse:
        return self._response(self._future.result(timeout_s))

    def add_done_callback(self, callback: Callable[[ServiceResponse], None]) -> None:
        self._future.add_done_callback(lambda future: callback(self._response(future.result())))

    def cancel(self) -> None:
        self._cancel()

    def _response(self, answer: Any) -> ServiceResponse:
        return self._respond(answer, self._running.usage if self._running else Usage(), self._after_chunks)


def _do_nothing() -> None:
    """The response is done: there is nothing to cancel."""
