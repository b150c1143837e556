"""One thread that does what is due: deadlines, and pauses between tries."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

logger = logging.getLogger(__name__)


class Ends(Protocol):
    @property
    def over(self) -> bool: ...


T = TypeVar("T", bound=Ends)


class Timers:
    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, weakref.ref[Any], Callable[[Any], None]]] = []
        self._order = itertools.count()
        self._room = 64
        self._closed = False
        self.thread = threading.Thread(target=self._watch, name=name, daemon=True)
        self.thread.start()

    def at(self, moment: float, about: T, action: Callable[[T], None]) -> None:
        """Do `action` at a moment of time.monotonic(), unless what it is about is over by then, or gone."""
        with self._changed:
            if len(self._heap) >= self._room:  # what is over need not be watched
                self._heap = [entry for entry in self._heap if _watched(entry[2])]
                heapq.heapify(self._heap)
                self._room = 2 * len(self._heap) + 64
            entry = (moment, next(self._order), weakref.ref(about), action)
            heapq.heappush(self._heap, entry)
            if self._heap[0] is entry:
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _watch(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                while not self._closed and (not self._heap or self._heap[0][0] > now):
                    self._changed.wait(min(self._heap[0][0] - now, 3600) if self._heap else None)
                    now = time.monotonic()
                if self._closed:
                    return
                _, _, about, action = heapq.heappop(self._heap)
            self._do(about, action)
            del about, action  # this thread holds nothing while it waits

    @staticmethod
    def _do(about: weakref.ref[Any], action: Callable[[Any], None]) -> None:
        subject = about()
        if subject is not None and not subject.over:
            try:
                action(subject)
            except BaseException:  # this thread must not end
                logger.exception("a deadline's work raised")


def _watched(about: weakref.ref[Any]) -> bool:
    subject = about()
    return subject is not None and not subject.over
