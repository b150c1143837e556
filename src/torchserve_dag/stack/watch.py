"""Watch a process, and start it again whenever it has ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress

from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.supervised import Role, Supervised

logger = logging.getLogger(__name__)

PAUSES_S = (0, 0, 1, 2, 3, 5)
"""Seconds before each restart of a process that ends again and again; the last pause is repeated."""
STEADY_S = 10.0
"""A process that ran for this long did not end again and again."""


class Watch:
    """Watches one process through its record: it need not be a child of this one."""

    def __init__(
        self, supervised: Supervised, role: Role, start: Callable[[], None], why: Callable[[], str] = lambda: ""
    ) -> None:
        """`start` starts the process and records it; `why` is the reason of its end, if there is one to be had."""
        self._supervised, self._role, self._start, self._why = supervised, role, start, why
        self._ends = 0
        self._due: float | None = None
        """When the process, which has ended, is started again."""
        self._started = 0.0
        """When it was last started from here."""

    def look(self) -> None:
        """Start the process if it has ended and its pause is over."""
        if self._supervised.process(self._role):
            self._due = None
            return
        if self._due is None:
            self._due = time.monotonic() + self._ended(self._why())
        if time.monotonic() < self._due:
            return
        self._due, self._started = None, time.time()
        try:
            self._start()
        except (ServerError, OSError) as error:
            self._due = time.monotonic() + self._ended(str(error).rstrip("."))

    def _ended(self, why: str) -> float:
        """Record the end of the process; how long to wait until it is started again."""
        record, now = self._supervised.record(self._role), time.time()
        if record is None:  # it was never started
            return 0.0
        if now - max(record.since, self._started) >= STEADY_S:
            self._ends = 0
        pause = PAUSES_S[min(self._ends, len(PAUSES_S) - 1)]
        self._ends += 1
        problem = f"ended at {time.strftime('%H:%M:%S', time.localtime(now))}" + (f" ({why})" if why else "")
        problem += f", the {self._ends}th time in a row" if self._ends > len(PAUSES_S) else ""
        logger.warning("%s %s; it is started again in %d s", self._role, problem, pause)
        with suppress(OSError):  # a full disk, say, must not keep it from being started again
            self._supervised.note(self._role, problem)
        return pause
