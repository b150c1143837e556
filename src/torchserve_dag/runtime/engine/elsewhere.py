"""Items that run elsewhere, in a served model or a sub-workflow: they occupy no lane, and can be cancelled.

Each station limits its items in flight. While an item is in flight, its request keeps how to cancel it
(`Request.elsewhere`). The engine cancels it when the request ends, or when the item reaches its node's own time limit.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.data.options import SHORTEST_S, Options, Priority
from torchserve_dag.runtime.engine.lanes import BULK_EVERY
from torchserve_dag.runtime.engine.plan import Plan
from torchserve_dag.runtime.engine.request import Item, Request
from torchserve_dag.runtime.engine.runner import (
    BatchStarter,
    Cancel,
    Chunk,
    OwnEngine,
    Release,
    Starter,
    internal_error,
)
from torchserve_dag.runtime.engine.station import Station
from torchserve_dag.runtime.graph.graph import REQUEST
from torchserve_dag.runtime.messages import Failure

logger = logging.getLogger(__name__)

Deliver = Callable[[Station[Item], Sequence[Item], Sequence[Any], float], None]
"""Receives the answers to a station's items, and when their run began."""

DeliverChunk = Callable[[Item, Chunk], None]
"""Receives a chunk of an item that goes on."""

Begin = Callable[[Request, Any], None]
"""Starts the graph of a sub-workflow for a request whose message is decoded already."""


class Elsewhere:
    """Starts items elsewhere in the order of their queues, and passes their answers to the engine."""

    def __init__(
        self,
        lock: threading.Lock,
        dropped: list[Item],
        deliver: Deliver,
        deliver_chunk: DeliverChunk,
        begin: Begin,
    ) -> None:
        """`lock` is the engine's; for `dropped` see FairQueue."""
        self._lock = lock
        self._dropped = dropped
        self._deliver, self._deliver_chunk = deliver, deliver_chunk
        self._begin = begin
        self._starting = _Starting()

    def reserve(self, station: Station[Item], own: OwnEngine, items: Sequence[Item]) -> None:
        """Queue items for a model with an engine of its own, once that has reserved what they need."""
        for item in items:
            try:
                own.reserve(item.value, item.request.root.options.token, partial(self._reserved, station, item))
            except BaseException as error:  # noqa: BLE001 (as below: it is closing)
                fault = logs.report(logger, error, f"{station.name} reserves nothing any more", line=False)
                self._reserved(station, item, internal_error(station.name, fault))

    def _reserved(self, station: Station[Item], item: Item, reserved: Release | Failure) -> None:
        if isinstance(reserved, Failure):
            self._deliver(station, [item], [reserved], time.monotonic())
            return
        with self._lock:
            obsolete = item.obsolete
            if not obsolete:
                item.reserved = item.request.elsewhere[item] = reserved
                station.push([item])
        if obsolete:
            reserved()
        else:
            self.start_items(station)

    def start_items(self, station: Station[Item]) -> None:
        """Start a station's queued items, up to its limit of items in flight."""
        stations = self._starting.stations
        stations.append(station)
        if len(stations) > 1:  # a caller further up this thread's stack starts them: answers that come at once must not
            return  # deepen the stack
        try:
            while stations:
                self._start_items_of(stations[0])
                del stations[0]
        finally:
            stations.clear()  # otherwise this thread would never start items again

    def start_batch(self, starter: BatchStarter, items: Sequence[Item]) -> None:
        """Start a batch in a handler's process."""
        began = time.monotonic()

        def deliver(answers: Mapping[int, Any]) -> None:
            nonlocal began
            since, began = began, time.monotonic()  # of an item that streams, each chunk's time counts
            self._answered([items[place] for place in answers], list(answers.values()), since)

        starter([(item.request.root.id, item.value) for item in items], deliver)

    def start_served(self, starter: Starter, items: Sequence[Item]) -> None:
        """Start an item in a served model, or in a model with an engine of its own."""
        (item,) = items
        request, began = item.request, time.monotonic()
        limit = request.root.deadline
        if item.code.attempts.timeout_s:
            limit = min(limit, item.since + item.code.attempts.timeout_s)

        def done(answer: Any) -> None:
            if isinstance(answer, Chunk):
                self._deliver_chunk(item, answer)
            else:
                self._answered(items, [answer], began)

        asked = request.root.options
        options = Options(timeout_s=max(SHORTEST_S, limit - began), priority=asked.priority, trace=asked.trace)
        cancel = starter(item.value, options, done)
        self._keep_cancel(item, cancel)

    def start_inner(self, plan: Plan[Item], items: Sequence[Item]) -> None:
        """Start an item in a sub-workflow, as a separate request whose answer becomes the item's."""
        (item,) = items
        outer, began = item.request, time.monotonic()
        values = {"parameters": outer.values.get("parameters", {}), REQUEST: item.value}

        def on_answer(answer: Any) -> None:
            self._answered(items, [answer], began)

        inner = Request(
            outer.id, plan, outer.deadline, values, on_answer, outer.end_request, outer.options, parent=item
        )
        self._keep_cancel(item, inner.cancel)
        self._begin(inner, item.value)

    def _start_items_of(self, station: Station[Item]) -> None:
        while True:
            with self._lock:
                station.turn += 1
                first: Priority = "bulk" if station.turn % BULK_EVERY == 0 else "interactive"
                items = station.take(station.free, first)
                station.in_flight += len(items)
            self._dropped.clear()
            if not items:
                return
            for batch in [items] if station.one_at_a_time else [[item] for item in items]:
                try:
                    station.start(batch)
                except BaseException as error:  # noqa: BLE001 (the caller must not end)
                    fault = logs.report(logger, error, f"{station.name} could not be started", line=False)
                    failed = [internal_error(station.name, fault)] * len(batch)
                    self._answered(batch, failed, time.monotonic())

    def _keep_cancel(self, item: Item, cancel: Cancel) -> None:
        """Keep `cancel` for a started item; cancel at once if nobody waits for its answer any more."""
        with self._lock:
            obsolete = item.obsolete
            if not obsolete:
                item.request.elsewhere[item] = partial(_both, cancel, item.reserved) if item.reserved else cancel
        if obsolete:
            cancel()

    def _answered(self, items: Sequence[Item], answers: Sequence[Any], began: float) -> None:
        station = items[0].station
        with self._lock:
            for item, answer in zip(items, answers, strict=True):
                if not isinstance(answer, Chunk):
                    station.leave(item)
                    item.request.elsewhere.pop(item, None)
        for item, answer in zip(items, answers, strict=True):
            if item.reserved and not isinstance(answer, Chunk):
                item.reserved()
        self._deliver(station, items, answers, began)
        self.start_items(station)


def _both(cancel: Cancel, release: Release) -> None:
    cancel()
    release()


class _Starting(threading.local):
    """The stations whose items the current thread is starting."""

    def __init__(self) -> None:
        self.stations: list[Station[Item]] = []
