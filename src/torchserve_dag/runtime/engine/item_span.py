"""The span of an attempt of an item; of a language model's with OpenTelemetry's attributes for generative AI."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.engine.counts import operation_of
from torchserve_dag.runtime.engine.request import Item
from torchserve_dag.runtime.engine.runner import OwnEngine
from torchserve_dag.runtime.engine.span import SERVED_BY, Attribute, Span, usage_attributes
from torchserve_dag.runtime.messages import Chat, Failure, Prompt

logger = logging.getLogger(__name__)


def add_span(item: Item, answer: Any, began: float, now: float, batch: int) -> None:
    """Keep the span of an attempt that has ended, or of a chunk that was asked for."""
    end = time.time_ns()
    root = item.request.root
    attributes: dict[str, Attribute] = {
        **(item.said or {}),
        "queue_s": began - item.since,
        "batch": batch,
        "tries": item.failed_attempts,
        **({"round": item.round} if item.node.repeat else {}),
        **(_of_language(item, own) if (own := item.station.own_engine) else {}),
        **_of_answer(answer),
    }
    failure = answer if isinstance(answer, Failure) else None
    start_ns = end - int((now - began) * 1e9)
    root.spans.append(Span(item.station.name, root.id, root.options.trace, start_ns, end, attributes, failure))


def _of_answer(answer: Any) -> Mapping[str, Attribute]:
    """What a message says of itself: its `span_attributes()`, which may be a user's."""
    told = getattr(answer, "span_attributes", None)
    if not callable(told):
        return {}
    try:
        return dict(told())
    except Exception as error:  # noqa: BLE001 (a span that lacks something is better than no answer)
        logs.report(logger, error, f"{type(answer).__name__}.span_attributes raised")
        return {}


def _of_language(item: Item, own: OwnEngine) -> Mapping[str, Attribute]:
    """Numbers and names only: prompts and answers are in no span."""
    adapter = item.value.adapter if isinstance(item.value, Chat | Prompt) else None
    attributes: dict[str, Attribute] = {
        "gen_ai.operation.name": operation_of(item.value),
        "gen_ai.provider.name": own.name,
        "gen_ai.request.model": f"{own.model}:{adapter}" if adapter else own.model,
    }
    if written := item.written:
        attributes["gen_ai.response.time_to_first_chunk"] = written.first_token - item.since
        if written.finish_reasons:
            attributes["gen_ai.response.finish_reasons"] = tuple(written.finish_reasons)
        if written.served_by:
            attributes[SERVED_BY] = written.served_by
        if written.usage:
            attributes |= usage_attributes(written.usage)
    return attributes
