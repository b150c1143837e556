"""One thread that runs actions at their time: deadlines, and retries after their pauses."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torchserve_dag.runtime import logs

logger = logging.getLogger(__name__)


class Subject(Protocol):
    @property
    def obsolete(self) -> bool:
        """Whether its timers must not act any more."""


T = TypeVar("T", bound=Subject)


class Timers:
    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, weakref.ref[Any], Callable[[Any], None]]] = []
        self._order = itertools.count()
        self._room = 64
        self._closed = False
        self.thread = threading.Thread(target=self._watch, name=name, daemon=True)
        self.thread.start()

    def schedule(self, moment: float, subject: T, action: Callable[[T], None]) -> None:
        """Call `action(subject)` at a moment of time.monotonic(), unless the subject is obsolete or deleted by then."""
        with self._changed:
            if len(self._heap) >= self._room:  # drop the timers of obsolete subjects
                self._heap = [entry for entry in self._heap if _pending(entry[2])]
                heapq.heapify(self._heap)
                self._room = 2 * len(self._heap) + 64
            entry = (moment, next(self._order), weakref.ref(subject), action)
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
                _, _, reference, action = heapq.heappop(self._heap)
            self._call(reference, action)
            del reference, action  # a waiting thread must keep nothing alive

    @staticmethod
    def _call(reference: weakref.ref[Any], action: Callable[[Any], None]) -> None:
        subject = reference()
        if subject is not None and not subject.obsolete:
            try:
                action(subject)
            except BaseException as error:  # noqa: BLE001 (this thread must not end)
                logs.report(logger, error, "the action of a timer raised")


def _pending(reference: weakref.ref[Any]) -> bool:
    subject = reference()
    return subject is not None and not subject.obsolete
