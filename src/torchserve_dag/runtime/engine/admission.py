"""Which requests may enter an engine, and how long they may stay: limits, cancel keys, deadlines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http import HTTPStatus

from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.engine.request import Request
from torchserve_dag.runtime.engine.timers import Timers
from torchserve_dag.runtime.messages import Failure

SWEEP_S = 0.5
"""Seconds from a missed deadline until the request's items are dropped from the queues."""

CLOSING = Failure(HTTPStatus.SERVICE_UNAVAILABLE, "The workflow is closing.", "Overloaded")


class Admission:
    """The requests in flight in an engine."""

    def __init__(
        self,
        max_inside: int,
        pixels_inside: int,
        timeout_s: float,
        lock: threading.Lock,
        timers: Timers,
        sweep: Callable[[], None],
    ) -> None:
        """`lock` is the engine's; `sweep` drops obsolete items from the queues."""
        self.max_inside = max_inside
        self._pixels_inside = pixels_inside
        self._pixels = 0
        self.timeout_s = timeout_s
        self.closed = False
        self._lock = lock
        self._timers = timers
        self._sweep = sweep
        self._sweep_scheduled = False
        self._in_flight: dict[Request, None] = {}
        self._by_cancel_key: dict[str, set[Request]] = {}

    def __len__(self) -> int:
        """How many requests are in flight."""
        return len(self._in_flight)

    def limit_s(self, options: Options) -> float:
        """How long a request may take: as long as the client waits, and no longer than the workflow allows."""
        return min(self.timeout_s, options.timeout_s or self.timeout_s)

    def admit(self, request: Request) -> Failure | None:
        """Register a request and schedule its deadline. Returns a Failure instead where the request is refused."""
        with self._lock:
            if self.closed:
                return CLOSING
            if len(self._in_flight) >= self.max_inside:
                message = f"{self.max_inside:,} requests are in progress; try again in a second."
                return Failure(HTTPStatus.SERVICE_UNAVAILABLE, message, "Overloaded")
            if request.deadline <= time.monotonic():  # whoever sent it is gone: nothing is begun for it
                return self.too_late(request.options)
            self._in_flight[request] = None
            if request.options.cancel_key:
                self._by_cancel_key.setdefault(request.options.cancel_key, set()).add(request)
            self._timers.schedule(request.deadline, request, self._expire)
        return None

    def hold(self, request: Request, pixels: int) -> None:
        """Count the pixels of a request's decoded message until the request is answered. Under the lock."""
        request.pixels = pixels
        self._pixels += pixels

    @property
    def full_of_pixels(self) -> bool:
        """Whether no further message may be decoded before a request is answered."""
        return self._pixels >= self._pixels_inside

    def remove(self, request: Request) -> None:
        """Forget an answered request. Under the lock."""
        self._in_flight.pop(request, None)
        self._pixels -= request.pixels
        key = request.options.cancel_key
        sharing = self._by_cancel_key.get(key) if key else None
        if key and sharing:
            sharing.discard(request)
            if not sharing:
                del self._by_cancel_key[key]

    def with_cancel_key(self, key: str) -> list[Request]:
        with self._lock:
            return list(self._by_cancel_key.get(key, ()))

    def close(self) -> list[Request]:
        """Refuse requests from now on. Returns the requests in flight. Under the lock."""
        self.closed = True
        return list(self._in_flight)

    @property
    def obsolete(self) -> bool:
        """Whether the scheduled sweep must not run any more, because the engine is closed."""
        return self.closed

    def too_late(self, options: Options, waiting: str | None = None) -> Failure:
        """The failure of a request at its deadline: 504, or 408 if the client chose a shorter limit than the workflow.

        A client's own limit is no failure of this version: a front door must not eject it, or roll it back, for that.
        """
        limit = self.limit_s(options)
        status = HTTPStatus.REQUEST_TIMEOUT if limit < self.timeout_s else HTTPStatus.GATEWAY_TIMEOUT
        return Failure(status, f"No answer within {limit:g} s.", "Timeout", waiting)

    def _expire(self, request: Request) -> None:
        """Fail a request that is still in flight at its deadline, which chunks of its answer may have moved."""
        if request.deadline > time.monotonic():
            self._timers.schedule(request.deadline, request, self._expire)
            return
        waiting = next((name for name in request.plan.nodes if name not in request.values), None)
        request.fail(self.too_late(request.options, waiting))
        if not self._sweep_scheduled:
            self._sweep_scheduled = True
            self._timers.schedule(time.monotonic() + SWEEP_S, self, Admission._sweep_queues)

    def _sweep_queues(self) -> None:
        """Drop obsolete items from the queues. Lanes do so when they take items, but not while every lane hangs."""
        self._sweep_scheduled = False
        self._sweep()
