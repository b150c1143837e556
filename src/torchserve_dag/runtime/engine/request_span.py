"""The span of a whole request; of a workflow of language models with OpenTelemetry's attributes for workflows."""

from __future__ import annotations

import time
from typing import Any

from torchserve_dag.runtime.engine.request import Request
from torchserve_dag.runtime.engine.span import SERVED_BY, Attribute, Span, usage_attributes
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.messages import Failure, Usage

INVOKE_WORKFLOW = "invoke_workflow"
"""The operation of a workflow of language models, in OpenTelemetry's words."""


def whole_span(graph: Graph, request: Request, answer: Any) -> Span:
    """The span of a client's request that has ended. Like those of its nodes it has no text of the client's."""
    attributes: dict[str, Attribute] = {"version": graph.version}
    if request.stream and request.stream.first_sent is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = request.stream.first_sent - request.began
    if not graph.of_handler and (request.usage != Usage() or _asks_models(request)):
        attributes["gen_ai.operation.name"] = INVOKE_WORKFLOW
        attributes["gen_ai.agent.name"] = graph.name
        attributes |= usage_attributes(request.usage)
        if served_by := [str(span.attributes[SERVED_BY]) for span in request.spans if SERVED_BY in span.attributes]:
            attributes[SERVED_BY] = tuple(dict.fromkeys(served_by))
    failure = answer if isinstance(answer, Failure) else None
    return Span(graph.name, request.id, request.options.trace, request.began_ns, time.time_ns(), attributes, failure)


def _asks_models(request: Request) -> bool:
    return any(station.own_engine for station in request.plan.stations.values())
