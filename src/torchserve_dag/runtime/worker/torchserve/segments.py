"""One model of a `.war`: requests and responses are envelopes, passed from node to node by TorchServe's own engine."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from torchserve_dag.runtime.data import codec
from torchserve_dag.runtime.data.content_encoding import decompressed
from torchserve_dag.runtime.data.parts import Body
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.graph.torchserve.segment import ABOUT_PART, FAILURE_PART, REQUEST_PART, segments, unseal
from torchserve_dag.runtime.messages import Failure, InputError
from torchserve_dag.runtime.worker.protocol import OnChunk, Part, PendingResponse, ServiceRequest, ServiceResponse
from torchserve_dag.runtime.worker.response import MAX_BYTES, too_large, unwritten
from torchserve_dag.runtime.worker.service import Pending, WorkflowService, read_archive


def load(folder: Path, gpu: int | None) -> SegmentService:
    """Like `load` of `service.py`, for the archive of a segment."""
    project, graph, build = read_archive(folder)
    return SegmentService(project, graph, build, gpu)


class SegmentService(WorkflowService):
    """Responds with envelopes, always with status 200: TorchServe's engine drops responses with another status."""

    def _graph_to_run(self, graph: Graph) -> Graph:
        self._segment = segments(graph)[self._build["segment"]]
        part = self._segment.part()
        return replace(part, serve=replace(part.serve, keep=None))  # it sees a part of each request only

    def submit(self, request: ServiceRequest, on_chunk: OnChunk | None = None) -> PendingResponse:  # noqa: ARG002
        try:
            parts = self._open(request)
        except InputError as error:
            return Pending(partial(self._seal, request.id, {})).refused(Failure(error.status, error.message))
        pending = Pending(partial(self._seal, request.id, parts))
        if failure := codec.failure_in(parts.get(FAILURE_PART, b"")):
            return pending.refused(failure)
        content_type, parameters = json.loads(parts[ABOUT_PART])
        running = self._workflow.engine.submit(
            Body(parts[REQUEST_PART], content_type),
            parameters,
            request_id=request.id,
            known=self._segment.known_results(parts),
        )
        return pending.follow(running)

    def _open(self, request: ServiceRequest) -> dict[str, bytes]:
        if self._segment.known:
            envelopes = request.parts if request.parts is not None else [Part("body", request.body)]
            return unseal({part.name: part.content for part in envelopes})
        # The first segment gets the client's request: its body is no envelope, even if it looks like one.
        message, parameters = self._read(request)
        if not isinstance(message, Body):
            what = "a .war takes no message in the parts of a form."
            raise InputError(f"The request is a form, and {what}", HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        about = json.dumps([message.content_type, dict(parameters)]).encode()
        return {REQUEST_PART: decompressed(message.content, message.encoding), ABOUT_PART: about}

    def _seal(self, request_id: str, parts: dict[str, bytes], answer: Any, *_: Any) -> ServiceResponse:
        try:
            body = self._segment.seal(parts, answer)
        except Exception as error:  # noqa: BLE001 (Pillow's, too)
            return self._failed(parts, unwritten(error, request_id, self._named))
        return ServiceResponse(body) if len(body) <= MAX_BYTES else self._failed(parts, too_large(len(body)))

    def _failed(self, parts: dict[str, bytes], failure: Failure) -> ServiceResponse:
        return ServiceResponse(self._segment.seal(parts, failure))
