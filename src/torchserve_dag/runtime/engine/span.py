"""What an observer gets of a request that has ended: a span for each attempt of each item, and one for the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torchserve_dag.runtime.messages import Failure


@dataclass(frozen=True, slots=True)
class Span:
    name: str
    """The node's code; of the request as a whole, the workflow."""
    request_id: str
    trace: str | None
    """The client's `traceparent`."""
    start_ns: int
    """As time.time_ns()."""
    end_ns: int
    attributes: Mapping[str, str | int | float]
    failure: Failure | None


Observer = Callable[[Sequence[Span]], None]
"""Takes the spans of one request, that of the whole request first. It must not block."""
