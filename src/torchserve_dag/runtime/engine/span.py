"""The spans of an ended request, for an observer: one for each attempt of each item, and one for the request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torchserve_dag.runtime.messages import Failure

Attribute = str | int | float | tuple[str, ...]
"""The value of an attribute. Names that begin with `gen_ai.` are OpenTelemetry's, the others this package's."""


@dataclass(frozen=True, slots=True)
class Span:
    name: str
    """The name of the node's code; for the whole request, that of the workflow."""
    request_id: str
    trace: str | None
    """The client's `traceparent`."""
    start_ns: int
    """As time.time_ns()."""
    end_ns: int
    attributes: Mapping[str, Attribute]
    failure: Failure | None


Observer = Callable[[Sequence[Span]], None]
"""Receives the spans of one request, with that of the whole request first. It must not block."""
