"""What a node runs: a handler, or a function made to look like one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

from torchserve_dag.messages import Failure, InputError

logger = logging.getLogger(__name__)

Runner = Callable[[Sequence[Any]], Sequence[Any]]
"""Answers for items, one each, in order; a Failure for each that has none. For a node of several
parameters an item is the tuple of their values."""


def function_runner(function: Callable[..., Any]) -> Runner:
    """A function as a runner: one item at a time, each one's exception its own."""

    def run(items: Sequence[Any]) -> list[Any]:
        return [_call(function, item) for item in items]

    return run


def internal_error(node: str) -> Failure:
    return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, f"{node} failed; the log says why.", "InternalError", node)


def _call(function: Callable[..., Any], item: Any) -> Any:
    try:
        return function(**item) if isinstance(item, dict) else function(item)
    except InputError as error:
        return Failure(error.status, error.message)
    except BaseException:  # a lane must not end, whatever a function raises
        name = getattr(function, "__name__", "a function")
        logger.exception("%s raised", name)
        return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, f"{name} failed; the log says why.", "InternalError")
