"""The time limit of a whole call, and whether a failed call may be retried."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from torchserve_dag.clients.errors import ConnectionLost, ServingError, deadline_exceeded
from torchserve_dag.clients.flows import Call, Predict

FIRST_PAUSE_S = 0.1


class Deadline:
    """The end of a call, its retries and pauses included."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def left(self) -> float:
        """The seconds left. Raises DeadlineExceeded if there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise deadline_exceeded(self.timeout_s)
        return left


def pauses(retries: int) -> Iterator[float | None]:
    """The pause after each attempt, doubling, with jitter so that clients do not retry in step; None after the last."""
    for attempt in range(retries):
        yield FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5)  # noqa: S311 (no secret)
    yield None


def may_repeat(call: Call, error: ServingError, pause: float | None, deadline: Deadline) -> bool:
    """Whether a call that failed may be sent again, `pause` seconds from now.

    A prediction is repeated only if it cannot have been served, because it costs time and may have effects. All other
    calls are idempotent.
    """
    safe = error.unserved or (isinstance(error, ConnectionLost) and not isinstance(call, Predict))
    return safe and pause is not None and pause < deadline.left()
