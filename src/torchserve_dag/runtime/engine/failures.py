"""The failed attempts of a batch: how many, and what the log says of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from torchserve_dag.runtime.engine.request import Item
from torchserve_dag.runtime.messages import Failure

logger = logging.getLogger(__name__)


def count_failures(items: Sequence[Item], answers: Sequence[Any]) -> int:
    """How many attempts have failed; those that were given up before are counted already."""
    if not any(isinstance(answer, Failure) for answer in answers):
        return 0
    return sum(isinstance(answer, Failure) and not item.ended for item, answer in zip(items, answers, strict=True))


def log_failures(name: str, items: Sequence[Item], answers: Sequence[Any]) -> None:
    """A line for each failure that is not the sender's, with its request and its fault."""
    for item, answer in zip(items, answers, strict=True):
        if isinstance(answer, Failure) and answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            fault = f" (fault {answer.fault})" if answer.fault else ""
            logger.error("request %s: %s: %s%s", item.request.id, name, answer.message, fault)
