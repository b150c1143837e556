"""One model of a `.war`: requests and responses are envelopes, passed from node to node by TorchServe's own engine."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from torchserve_dag.runtime.data import codec
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.graph.torchserve.segment import ABOUT_PART, FAILURE_PART, REQUEST_PART, segments, unseal
from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.worker.protocol import OnChunk, PendingResponse, ServiceRequest, ServiceResponse
from torchserve_dag.runtime.worker.response import CANNOT_BE_WRITTEN, MAX_BYTES, too_large
from torchserve_dag.runtime.worker.service import Pending, WorkflowService

logger = logging.getLogger(__name__)


def load(folder: Path, gpu: int | None) -> SegmentService:
    """Like `load` of `service.py`, for the archive of a segment."""
    return SegmentService(folder, gpu)


class SegmentService(WorkflowService):
    """Responds with envelopes, always with status 200: TorchServe's engine drops responses with another status."""

    def _graph_to_run(self, graph: Graph) -> Graph:
        self._segment = segments(graph)[self._build["segment"]]
        return self._segment.part()

    def submit(self, request: ServiceRequest, on_chunk: OnChunk | None = None) -> PendingResponse:  # noqa: ARG002
        parts = self._open(request)
        pending = Pending(partial(self._seal, parts))
        if failure := codec.failure_in(parts.get(FAILURE_PART, b"")):
            return pending.refused(failure)
        content_type, parameters = json.loads(parts[ABOUT_PART])
        running = self._workflow.submit(
            parts[REQUEST_PART],
            parameters,
            content_type=content_type,
            request_id=request.id,
            known=self._segment.known_results(parts),
        )
        return pending.follow(running)

    def _open(self, request: ServiceRequest) -> dict[str, bytes]:
        if self._segment.known:
            return unseal(request.parts or {})
        # The first segment gets the client's request: its body is no envelope, even if it looks like one.
        about = json.dumps([request.content_type, dict(request.parameters)]).encode()
        return {REQUEST_PART: request.body, ABOUT_PART: about}

    def _seal(self, parts: dict[str, bytes], answer: Any, _: bool) -> ServiceResponse:  # noqa: FBT001
        try:
            body = self._segment.seal(parts, answer)
        except Exception:
            logger.exception("the result of %s cannot be written", self._segment.node)
            return self._failed(parts, CANNOT_BE_WRITTEN)
        return ServiceResponse(body) if len(body) <= MAX_BYTES else self._failed(parts, too_large(len(body)))

    def _failed(self, parts: dict[str, bytes], failure: Failure) -> ServiceResponse:
        return ServiceResponse(self._segment.seal(parts, failure))
