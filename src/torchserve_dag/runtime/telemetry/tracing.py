"""OpenTelemetry spans of each request and its nodes, off by default.

The environment variable `OTEL_TRACES_EXPORTER` turns them on, as in any program with OpenTelemetry, whose other
variables hold too. Its packages are imported only then.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from http import HTTPStatus
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from torchserve_dag.runtime.engine.span import Attribute, Observer, Span

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)

EXPORTERS = "OTEL_TRACES_EXPORTER"
SERVICE = "torchserve-dag"
"""The default of `OTEL_SERVICE_NAME`."""
PREFIX = "torchserve_dag."
"""Prefix of the attributes whose names have no dot: those of OpenTelemetry's semantic conventions have one."""

_PROTOCOLS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


@cache
def observer() -> Observer | None:
    """The process's observer, which exports spans; None where they are off, or cannot be exported."""
    exporters = os.environ.get(EXPORTERS, "")
    names = [name for part in exporters.split(",") if (name := part.strip()) and name != "none"]
    if not names:
        return None
    try:
        return span_maker(_provider(names))
    except ImportError as error:
        reason = f"{error.name or error} is missing (pip install 'torchserve-dag[tracing]')"
    except Exception as error:  # noqa: BLE001 (the worker serves, whatever an exporter raises because of its settings)
        reason = str(error)
    logger.warning("%s is %s, but no spans are exported: %s", EXPORTERS, exporters, reason)
    return None


def span_maker(provider: TracerProvider) -> Observer:
    """An observer that exports spans: a request's is a child of the client's, and its nodes' are its children."""
    from opentelemetry.context import Context  # noqa: PLC0415 (only where spans are on; likewise below)
    from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context  # noqa: PLC0415
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

    tracer = provider.get_tracer("torchserve_dag")
    header = TraceContextTextMapPropagator()

    def start(ours: Span, parent: Context, kind: SpanKind) -> trace.Span:
        span = tracer.start_span(ours.name, parent, kind, _attributes(ours), start_time=ours.start_ns)
        if ours.failure and ours.failure.status >= HTTPStatus.INTERNAL_SERVER_ERROR:  # a 4xx is the client's mistake
            span.set_status(Status(StatusCode.ERROR, ours.failure.message))
        return span

    def observe(spans: Sequence[Span]) -> None:
        request, *nodes = spans
        client = header.extract({"traceparent": request.trace or ""}, Context())  # a malformed header is ignored
        whole = start(request, client, SpanKind.SERVER)
        whole.set_attribute(f"{PREFIX}request_id", request.request_id)
        inside = set_span_in_context(whole, Context())
        for node in nodes:
            start(node, inside, SpanKind.INTERNAL).end(node.end_ns)
        whole.end(request.end_ns)

    return observe


def _attributes(span: Span) -> dict[str, Attribute]:
    attributes = {name if "." in name else f"{PREFIX}{name}": value for name, value in span.attributes.items()}
    if span.failure:
        attributes["error.type"] = span.failure.type
        attributes[f"{PREFIX}status"] = span.failure.status
        attributes[f"{PREFIX}message"] = span.failure.message
    return attributes


def _provider(names: Sequence[str]) -> TracerProvider:
    """A provider with all exporters, in threads of its own; spans for which its queue has no room are dropped."""
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
    """An exporter's class, by the name under which its package registers it."""
    if name == "otlp":
        protocols = (os.environ.get(f"OTEL_EXPORTER_OTLP_{which}PROTOCOL") for which in ("TRACES_", ""))
        protocol = next(filter(None, protocols), "http/protobuf")
        if protocol not in _PROTOCOLS:
            raise ValueError(f'"{protocol}" is not an OTLP protocol; known: {", ".join(_PROTOCOLS)}')
        name = _PROTOCOLS[protocol]
    for entry_point in entry_points(group="opentelemetry_traces_exporter", name=name):
        return entry_point.load()
    raise ValueError(f'no installed package has the exporter "{name}"')
