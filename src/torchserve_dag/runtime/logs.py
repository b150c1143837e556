"""What a log says: the traceback of a fault once a minute, and nothing of a client's at the beginning of a line."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

AGAIN_S = 60.0
"""How long a fault's traceback is not repeated."""
MAX_FAULTS = 200
"""How many faults are remembered; beyond it, all are forgotten, and have their tracebacks again."""
COUNTER = "fault counter"
"""The name of the thread that logs once a minute how often faults recurred: the process's, not a workflow's."""
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
    logger: logging.Logger
    shown: float
    """When its traceback was logged."""
    what: str = ""
    more: int = 0
    """How often it occurred since."""


_Count = tuple[_Fault, int]


@dataclass(slots=True)
class Faults:
    """The faults of a process: exceptions of one type, raised at one place."""

    clock: Callable[[], float] = time.monotonic
    _known: dict[tuple[str, ...], _Fault] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _counter: threading.Thread | None = None
    """Runs as long as faults recur, so that the last minute of a fault is counted too."""

    def report(self, logger: logging.Logger, error: BaseException, what: str, *, line: bool = True) -> str:
        """Log an exception, and return the id of its fault, by which lines of requests refer to it.

        With its traceback at first, and once a minute; between, in one line, or where `line` is false in none, because
        the request that it fails has a line of its own.
        """
        kind, place = type(error), _place(error)
        key = (kind.__module__, kind.__qualname__, *place, *([] if line else [what]))  # with `line`, it names a request
        now = self.clock()
        forgotten: list[_Count] = []
        with self._lock:
            fault = self._known.get(key)
            fresh = fault is None or now - fault.shown >= AGAIN_S
            if fault is None:
                if len(self._known) >= MAX_FAULTS:
                    forgotten = self._take_counts()
                    self._known.clear()
                fault = self._known[key] = _Fault(hashlib.sha256(repr(key).encode()).hexdigest()[:8], logger, now)
            more, fault.what = fault.more, f"{what}: {kind.__name__}"
            fault.shown, fault.more = (now, 0) if fresh else (fault.shown, more + 1)
            if not fresh and self._counter is None:
                self._start_counter()
        _log(forgotten)
        if fresh:
            logger.error("fault %s: %s%s", fault.id, what, _more(more), exc_info=error)
        elif line:
            logger.error("fault %s: %s: %s: %s", fault.id, what, kind.__name__, error)
        return fault.id

    def forget(self) -> None:
        """From now on, every fault has its traceback again."""
        with self._lock:
            self._known.clear()

    def _start_counter(self) -> None:
        counter = threading.Thread(target=self._count_each_minute, name=COUNTER, daemon=True)
        with suppress(RuntimeError):  # no thread can be started now: the next recurrence tries again
            counter.start()
            self._counter = counter

    def _count_each_minute(self) -> None:
        while True:
            time.sleep(AGAIN_S)
            with self._lock:
                counts = self._take_counts()
                if not counts:
                    self._counter = None
                    return
            _log(counts)

    def _take_counts(self) -> list[_Count]:
        """How often each fault occurred since it was last logged, if it did. Under the lock."""
        counts = [(fault, fault.more) for fault in self._known.values() if fault.more]
        for fault, _ in counts:
            fault.more = 0
        return counts


_faults = Faults()
report, forget = _faults.report, _faults.forget


def _log(counts: list[_Count]) -> None:
    for fault, more in counts:
        fault.logger.error("fault %s: %s%s", fault.id, fault.what, _more(more))


def _place(error: BaseException) -> tuple[str, str]:
    """Where an exception was raised: the file and the line of its last frame."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return (trace.tb_frame.f_code.co_filename, str(trace.tb_lineno)) if trace else ("", "")


def _more(count: int) -> str:
    return f" (and {count:,} more in the last minute)" if count else ""
