"""What a log says: the traceback of a fault once a minute, and nothing of a client's at the beginning of a line."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

AGAIN_S = 60.0
"""How long a fault's traceback is not repeated."""
MAX_FAULTS = 200
"""How many faults are remembered; beyond it, all are forgotten, and have their tracebacks again."""
COUNTS = "count of a fault"
"""The name of the threads that log, a minute later, how often a fault recurred: the process's, not a workflow's."""
CONTINUED = "  | "
"""The beginning of each line of a record after its first."""


class Formatter(logging.Formatter):
    """Marks the lines of a record after its first: a message or an exception may hold lines that a client wrote."""

    def __init__(self, inner: logging.Formatter | None = None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return f"\n{CONTINUED}".join(self._inner.format(record).splitlines())


@dataclass(slots=True)
class _Fault:
    id: str
    shown: float
    """When its traceback was logged."""
    what: str = ""
    more: int = 0
    """How often it occurred since."""


@dataclass(slots=True)
class Faults:
    """The faults of a process: exceptions of one type, raised at one place."""

    clock: Callable[[], float] = time.monotonic
    _known: dict[tuple[str, ...], _Fault] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def report(self, logger: logging.Logger, error: BaseException, what: str, *, line: bool = True) -> str:
        """Log an exception, and return the id of its fault, by which lines of requests refer to it.

        With its traceback at first, and once a minute; between, in one line, or where `line` is false in none, because
        the request that it fails has a line of its own.
        """
        kind, place = type(error), _place(error)
        key = (kind.__module__, kind.__qualname__, *place, *([] if line else [what]))  # with `line`, it names a request
        now = self.clock()
        with self._lock:
            fault = self._known.get(key)
            fresh = fault is None or now - fault.shown >= AGAIN_S
            if fault is None:
                if len(self._known) >= MAX_FAULTS:
                    self._known.clear()
                fault = self._known[key] = _Fault(hashlib.sha256(repr(key).encode()).hexdigest()[:8], now)
            more, fault.what = fault.more, f"{what}: {kind.__name__}"
            fault.shown, fault.more = (now, 0) if fresh else (fault.shown, more + 1)
            first_repeat = not fresh and not more
        if fresh:
            logger.error("fault %s: %s%s", fault.id, what, _more(more), exc_info=error)
        elif line:
            logger.error("fault %s: %s: %s: %s", fault.id, what, kind.__name__, error)
        if first_repeat:  # so that the last minute of a fault is counted too
            timer = threading.Timer(max(0.0, fault.shown + AGAIN_S - now), self._count, (logger, fault))
            timer.name, timer.daemon = COUNTS, True
            timer.start()
        return fault.id

    def forget(self) -> None:
        """From now on, every fault has its traceback again."""
        with self._lock:
            self._known.clear()

    def _count(self, logger: logging.Logger, fault: _Fault) -> None:
        with self._lock:
            more, fault.more = fault.more, 0
        if more:
            logger.error("fault %s: %s%s", fault.id, fault.what, _more(more))


_faults = Faults()
report, forget = _faults.report, _faults.forget


def _place(error: BaseException) -> tuple[str, str]:
    """Where an exception was raised: the file and the line of its last frame."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return (trace.tb_frame.f_code.co_filename, str(trace.tb_lineno)) if trace else ("", "")


def _more(count: int) -> str:
    return f" (and {count:,} more in the last minute)" if count else ""
