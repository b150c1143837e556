"""The worker threads of one device (its lanes), and which batch each takes next.

On a CPU there is one lane for each core. A lane never takes so many items at once that another lane idles. If no
station has a full batch, a lane first runs stations whose results may fill one, and only then takes a partial batch: a
single request never waits for others to fill its batch, and under load batches fill by themselves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from torchserve_dag.runtime.data.options import Priority
from torchserve_dag.runtime.engine.request import Item
from torchserve_dag.runtime.engine.station import CPU, Station, shallow_first

MAX_FILL_WAIT_S = 0.05
"""How long an item may wait for its batch to fill while a lane has other work to do."""

BULK_EVERY = 8
"""Every eighth batch takes bulk items before interactive ones, so that bulk requests are not starved."""

FAIR_EVERY = 5
"""Every FAIR_EVERY-th batch is of the station that was served least recently, so that a node with thousands of items
does not starve the others."""

Run = Callable[[Station[Item], list[Item]], None]

SetAlone = Callable[[bool], None]
"""Called in a lane's thread before each batch, with whether all other lanes were idle when the lane took the batch."""


class Lanes:
    """`run` is called with each batch, in a lane's thread; `lock` is the engine's."""

    def __init__(
        self,
        name: str,
        device: str,
        count: int,
        stations: Sequence[Station[Item]],
        lock: threading.Lock,
        run: Run,
        set_alone: SetAlone,
        dropped: list[Item],
    ) -> None:
        self.device = device
        self._dropped = dropped
        self._stations = shallow_first(station for station in stations if station.device == device)
        self._lock = lock
        self._work = threading.Condition(lock)
        self._run = run
        self._set_alone = set_alone
        self._closed = False
        self._idle = 0
        self._turn = 0
        self.busy: dict[int, tuple[float, list[Item]]] = {}
        """By lane: when its batch began, and the batch's items; no items if the batch has just ended."""
        self._next: dict[int, tuple[Station[Item], list[Item]]] = {}
        """By lane: the batch that the lane runs next, which bypasses the queue."""
        self.threads = [
            threading.Thread(target=self._lane, name=f"{name}-{device}-{i}", daemon=True) for i in range(count)
        ]
        for thread in self.threads:
            thread.start()

    def push(self, station: Station[Item], items: list[Item], *, only: bool) -> None:
        """Queue items for a station. `only`: no other station gets items in the same step. Under the lock."""
        me = threading.get_ident()
        one_turn = self._fits_one_turn(station, len(items))
        if only and one_turn and self._may_go_on(me, station):
            self._next[me] = (station, items)
            return
        station.push(items)
        if self._idle:
            turns = 1 if one_turn else len(items)
            # A lane that has just ended a batch takes the next one itself: waking another lane for it costs more.
            self._work.notify(turns - 1 if me in self.busy else turns)

    def _may_go_on(self, me: int, station: Station[Item]) -> bool:
        """Whether the calling thread is a lane that may run this batch next, bypassing the queue.

        It may if no queued item would be taken before the batch.
        """
        return (
            me in self.busy
            and me not in self._next
            and not any(len(other) and other.depth >= station.depth for other in self._stations)
        )

    def _fits_one_turn(self, station: Station[Item], items: int) -> bool:
        """Whether one lane runs all these items in one turn, because they are calls of a quick function.

        False if each of them can have an idle lane: then none has to wait, should another be slow after all.
        """
        return station.bundle and items <= station.max_items and not 1 < items <= 1 + self._idle

    def wake(self) -> None:
        """A station is no longer paused, or there are items to drop. Under the lock."""
        self._work.notify_all()

    def close(self) -> None:
        """Under the lock."""
        self._closed = True
        self._work.notify_all()

    def _lane(self) -> None:
        me = threading.get_ident()
        ran: Station[Item] | None = None
        while True:
            with self._lock:
                if ran is not None:
                    del self.busy[me]
                    ran.in_flight -= 1
                    ran = None
                while not self._closed and (taken := self._take()) is None and not self._dropped:
                    self._idle += 1
                    self._work.wait()
                    self._idle -= 1
                if self._closed:
                    return
                if taken:
                    station, items = taken
                    station.in_flight += 1
                    more = bool(self._idle or not self.busy) and any(map(len, self._stations))
                    alone = not self.busy and not more
                    if self._idle and more:
                        self._work.notify()  # one batch may have made more items ready than lanes were woken for
                    self.busy[me] = (time.monotonic(), items)
            self._dropped.clear()
            if taken:
                self._set_alone(alone)
                self._run(station, items)
                items.clear()  # so that an idle lane keeps no image alive; without the lock, because freeing takes time
                ran = station

    def _take(self) -> tuple[Station[Item], list[Item]] | None:
        """The next batch, under the lock."""
        batch = self._next.pop(threading.get_ident(), None)
        if batch:
            return batch
        self._turn += 1
        order: tuple[Priority, Priority] = ("interactive", "bulk")
        if self._turn % BULK_EVERY == 0:
            order = ("bulk", "interactive")
        for priority in order:
            station = self._choose(priority)
            if station is not None:
                most = station.max_items
                # Share the items with idle lanes, unless one turn runs them all. On a GPU, whose lanes are not cores, a
                # batch stays whole.
                if self.device == CPU and not self._fits_one_turn(station, len(station)):
                    most = min(most, -(-len(station) // (1 + self._idle)))
                station.turn = self._turn
                return station, station.take(most, priority)
        return None

    def _choose(self, priority: Priority) -> Station[Item] | None:
        # Stations are sorted by depth, shallowest first. A station is due if its batch is full or its first item has
        # waited too long. The deepest due station goes first, so that requests finish before others begin. If none is
        # due, the shallowest goes first: its results may fill the batch of a deeper one.
        first: Station[Item] | None = None
        due: list[Station[Item]] = []
        overdue = time.monotonic() - MAX_FILL_WAIT_S
        for station in self._stations:
            if station.paused:
                continue
            head = station.peek(priority)
            if head is not None:
                first = first or station
                if len(station) >= station.batch or head.since < overdue:
                    due.append(station)
        if not due:
            return first
        return due[-1] if self._turn % FAIR_EVERY else min(due, key=lambda station: station.turn)
