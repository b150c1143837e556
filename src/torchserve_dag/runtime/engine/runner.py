"""What runs items: a call that answers for several, one that answers piece by piece, or one that answers later."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from torchserve_dag.runtime.messages import Failure, InputError

logger = logging.getLogger(__name__)

Runner = Callable[[Sequence[Any]], Sequence[Any]]
"""Answers for items, one each, in order; a Failure for each that has none. For code that takes values by
their names an item is the dict of them. A runner with a true attribute `one_at_a_time` is never called by two
threads together."""

Done = Callable[[Any], None]
"""Takes an answer or a Failure, once, from any thread."""

Starter = Callable[[Any, float, Done], Callable[[], None]]
"""Starts one item elsewhere: the value, the seconds that it may take, and who to tell. It does not block, and
gives back how to call it off."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of an answer, and where the next ones come from."""

    value: Any
    rest: Rest


@dataclass(frozen=True, slots=True)
class Rest:
    """What the item of a yielding node becomes after its first piece."""

    pieces: Iterator[Any]


END: Final = object()
"""The answer after the last piece."""


def function_runner(name: str, answer: Callable[[Any], Any]) -> Runner:
    """What answers for one item, as a runner: each item's exception is its own."""

    def run(items: Sequence[Any]) -> list[Any]:
        return [_guarded(name, answer, item) for item in items]

    return run


def piece_runner(name: str, begin: Callable[[Any], Iterator[Any]]) -> Runner:
    """What yields, as a runner: each call brings every item one piece further."""

    def step(item: Any) -> Any:
        rest = item if isinstance(item, Rest) else Rest(iter(begin(item)))
        piece = next(rest.pieces, END)
        return END if piece is END else Piece(piece, rest)

    def run(items: Sequence[Any]) -> list[Any]:
        return [_guarded(name, step, item) for item in items]

    return run


def internal_error(node: str) -> Failure:
    return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, f"{node} failed; the log says why.", "InternalError", node)


def _guarded(name: str, work: Callable[[Any], Any], item: Any) -> Any:
    """What `work` gives, or the Failure that its exception is."""
    try:
        return work(item)
    except InputError as error:
        return Failure(error.status, error.message)
    except BaseException:  # a lane must not end, whatever a function raises
        logger.exception("%s raised", name)
        return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, f"{name} failed; the log says why.", "InternalError")
