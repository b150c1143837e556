"""What an answer says of itself on the span of its node: the `span_attributes` of its message, within limits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.engine.request import Item
from torchserve_dag.runtime.engine.runner import END, Chunk, Waits
from torchserve_dag.runtime.engine.span import Attribute, Scalar

logger = logging.getLogger(__name__)

MAX_ATTRIBUTES = 16
"""How many attributes of a message are on a span; further ones are left out."""
MAX_CHARACTERS = 200
"""The longest name of an attribute, which is left out beyond; a longer text is cut."""
MAX_ELEMENTS = 64
"""How many elements of a list are on a span, the first."""


def note_attributes(items: Sequence[Item], answers: Sequence[Any]) -> None:
    """Let each item know what its answer, or its next chunk, says of itself; at the end of chunks it is the last's.

    Called without the engine's lock: `span_attributes` is users' code.
    """
    for item, answer in zip(items, answers, strict=True):
        if answer is not END and not isinstance(answer, Waits):
            item.said = attributes_of(answer.value if isinstance(answer, Chunk) else answer)


def attributes_of(message: Any) -> Mapping[str, Attribute]:
    """The attributes that a message names; none of any other value."""
    if not hasattr(type(message), "span_attributes"):
        return {}
    try:
        return dict(islice(_fit(message.span_attributes()), MAX_ATTRIBUTES))
    except Exception as error:  # noqa: BLE001 (a user's method may raise anything)
        logs.report(logger, error, f"{type(message).__name__}.span_attributes raised", line=False)
        return {}


def _fit(named: Mapping[Any, Any]) -> Iterator[tuple[str, Attribute]]:
    """What a span can hold: scalars, and lists of scalars of one type."""
    for name, value in named.items():
        fit: Attribute | None
        if isinstance(value, list | tuple):
            found = tuple(one for one in map(_scalar, value[:MAX_ELEMENTS]) if one is not None)
            fit = found if len({type(one) for one in found}) <= 1 else tuple(map(str, found))
        else:
            fit = _scalar(value)
        if fit is not None and isinstance(name, str) and 0 < len(name) <= MAX_CHARACTERS:
            yield name, fit


def _scalar(value: Any) -> Scalar | None:
    value = plain.scalar(value)
    if isinstance(value, str):
        return value[:MAX_CHARACTERS]
    return value if isinstance(value, bool | int | float) else None
