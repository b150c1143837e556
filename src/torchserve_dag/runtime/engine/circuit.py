"""A circuit breaker: code that fails again and again is not tried for a while, so that its fallback answers at once."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from torchserve_dag.runtime.engine.runner import Chunk, Waits
from torchserve_dag.runtime.graph.graph import Circuit
from torchserve_dag.runtime.messages import Failure

OPEN = "CircuitOpen"
"""The type of the failure of an item that is not tried."""


class Breaker:
    """Not locked: the engine's lock is held while it is used. Times are on time.monotonic()'s clock."""

    def __init__(self, circuit: Circuit) -> None:
        self._circuit = circuit
        self._failures = 0
        """How many items in a row have failed."""
        self._open_until = 0.0

    def admits(self, now: float) -> bool:
        """Whether an item may be tried. Once the circuit has been open for long enough, one may, and decides."""
        if self._failures < self._circuit.failures:
            return True
        if now < self._open_until:
            return False
        self._open_until = now + self._circuit.open_s
        return True

    def record(self, answer: Any, now: float) -> None:
        """An attempt has an answer, or a Failure. A stream counts at its end: many break off after a chunk."""
        if isinstance(answer, Chunk | Waits):
            return
        if not isinstance(answer, Failure):
            self._failures = 0
        elif answer.type != OPEN:
            self._record_failure(answer, now)

    def _record_failure(self, failure: Failure, now: float) -> None:
        if not _is_its_own(failure):  # the code has looked at what was sent
            self._failures = 0
            return
        self._failures += 1
        if self._failures >= self._circuit.failures:
            self._open_until = now + self._circuit.open_s

    def refusal(self, name: str, now: float) -> Failure:
        """The failure of an item that is not tried."""
        message = f"{name} is not tried for {max(0.0, self._open_until - now):.0f} s more: "
        message += f"{self._circuit.failures} or more attempts in a row have failed."
        return Failure(HTTPStatus.SERVICE_UNAVAILABLE, message, OPEN)


def _is_its_own(failure: Failure) -> bool:
    """Whether a failure is the code's own, or its load's, and not the sender's."""
    return failure.status >= HTTPStatus.INTERNAL_SERVER_ERROR or failure.status == HTTPStatus.TOO_MANY_REQUESTS
