"""OpenTelemetry spans of each request and its nodes, off unless the environment asks for them.

`OTEL_TRACES_EXPORTER` turns them on, as in any program that has OpenTelemetry, and its other variables hold as well.
Its packages are imported only then.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from torchserve_dag.runtime.engine.span import Observer, Span

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)

EXPORTERS = "OTEL_TRACES_EXPORTER"
SERVICE = "torchserve-dag"
"""What spans are said to come from, unless `OTEL_SERVICE_NAME` says otherwise."""
PREFIX = "torchserve_dag."
"""Of the attributes that OpenTelemetry has no name for."""

_PROTOCOLS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


@cache
def observer() -> Observer | None:
    """What makes spans of the requests that end; None where nobody asked for them, or they cannot be had.

    A process has one.
    """
    asked = os.environ.get(EXPORTERS, "")
    names = [name for part in asked.split(",") if (name := part.strip()) and name != "none"]
    if not names:
        return None
    try:
        return span_maker(_provider(names))
    except ImportError as error:
        reason = f"{error.name or error} is missing (pip install 'torchserve-dag[tracing]')"
    except Exception as error:  # noqa: BLE001 (whatever an exporter thinks of its settings, the worker serves)
        reason = str(error)
    logger.warning("%s is %s, and there will be no spans: %s", EXPORTERS, asked, reason)
    return None


def span_maker(provider: TracerProvider) -> Observer:
    """What makes a provider's spans: a request's is a child of the client's, and its nodes' are children of it."""
    from opentelemetry.context import Context  # noqa: PLC0415 (only where spans are on; likewise below)
    from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context  # noqa: PLC0415
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

    tracer = provider.get_tracer("torchserve_dag")
    header = TraceContextTextMapPropagator()

    def start(one: Span, parent: Context, kind: SpanKind) -> trace.Span:
        span = tracer.start_span(one.name, parent, kind, _attributes(one), start_time=one.start_ns)
        if one.failure and one.failure.status >= 500:  # noqa: PLR2004 (below, it is the client's own mistake)
            span.set_status(Status(StatusCode.ERROR, one.failure.message))
        return span

    def observe(spans: Sequence[Span]) -> None:
        request, *nodes = spans
        client = header.extract({"traceparent": request.trace or ""}, Context())  # what is malformed, it ignores
        whole = start(request, client, SpanKind.SERVER)
        whole.set_attribute(f"{PREFIX}request_id", request.request_id)
        inside = set_span_in_context(whole, Context())
        for node in nodes:
            start(node, inside, SpanKind.INTERNAL).end(node.end_ns)
        whole.end(request.end_ns)

    return observe


def _attributes(one: Span) -> dict[str, str | int | float]:
    attributes = {f"{PREFIX}{name}": value for name, value in one.attributes.items()}
    if one.failure:
        attributes["error.type"] = one.failure.type
        attributes[f"{PREFIX}status"] = one.failure.status
        attributes[f"{PREFIX}message"] = one.failure.message
    return attributes


def _provider(names: Sequence[str]) -> TracerProvider:
    """Exports in threads of its own, to every exporter; what is more than its queue holds is dropped."""
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    exporters = [_exporter(name)() for name in names]
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: SERVICE}))
    provider = TracerProvider(resource=resource)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _exporter(name: str) -> Any:
    """An exporter's class, by the name that its package gives it."""
    if name == "otlp":
        named = (os.environ.get(f"OTEL_EXPORTER_OTLP_{which}PROTOCOL") for which in ("TRACES_", ""))
        protocol = next(filter(None, named), "http/protobuf")
        if protocol not in _PROTOCOLS:
            raise ValueError(f'"{protocol}" is not a protocol; known: {", ".join(_PROTOCOLS)}')
        name = _PROTOCOLS[protocol]
    for found in entry_points(group="opentelemetry_traces_exporter", name=name):
        return found.load()
    raise ValueError(f'no package here has the exporter "{name}"')
