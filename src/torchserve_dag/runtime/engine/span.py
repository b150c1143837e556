"""The spans of an ended request, for an observer: one for each attempt of each item, and one for the request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torchserve_dag.runtime.messages import Failure, Usage

Scalar = str | int | float | bool
Attribute = Scalar | tuple[Scalar, ...]
"""The value of an attribute. A name without a dot is this package's."""

SERVED_BY = "served_by"
"""Who has answered: the engine and the model; of a request, all of them."""


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


def usage_attributes(usage: Usage) -> dict[str, Attribute]:
    """The tokens of an answer, under OpenTelemetry's names."""
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
    }
