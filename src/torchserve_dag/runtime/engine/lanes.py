"""The worker threads of one device (its lanes), and which batch each takes next.

On a CPU there is one lane a core. A lane never takes so many items at once that another lane idles. A lane that finds
no full batch does the work that may fill one, and only then takes what there is: a lone request never waits for
others to fill its batch, and under load batches fill by themselves.
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
"""Every so many batches, a bulk request goes before the interactive ones, so that it is not starved."""

FAIR_EVERY = 5
"""Every so many batches, the station goes first that was served least recently, so that a node with thousands of items
does not starve the others."""

Run = Callable[[Station[Item], list[Item]], None]

SetAlone = Callable[[bool], None]
"""Told in a lane's thread, before each batch, whether no other lane had anything to do when it was taken."""


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
        """By lane: since when it runs a batch, and the batch's items; an empty list when it has just ended the batch.
        """
        self._next: dict[int, tuple[Station[Item], list[Item]]] = {}
        """By lane: a batch that it takes next, past the queue."""
        self.threads = [
            threading.Thread(target=self._lane, name=f"{name}-{device}-{i}", daemon=True) for i in range(count)
        ]
        for thread in self.threads:
            thread.start()

    def push(self, station: Station[Item], items: list[Item], *, only: bool) -> None:
        """Queue items for a station; `only`: no other station gets any at the moment. Under the lock."""
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
        """Whether the calling thread is a lane that may run this batch next itself, past the queue.

        That is so where nothing that waits would be taken before it.
        """
        return (
            me in self.busy
            and me not in self._next
            and not any(len(other) and other.depth >= station.depth for other in self._stations)
        )

    def _fits_one_turn(self, station: Station[Item], items: int) -> bool:
        """Whether one lane runs the items at once, because they are calls of a quick function.

        Not so where there is an idle lane for each of them: then no item waits for another, should it be slow after
        all.
        """
        return station.bundle and items <= station.max_items and not 1 < items <= 1 + self._idle

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
                    if ran.one_at_a_time and len(ran):
                        self._work.notify()  # lanes passed it over meanwhile, and this lane may take something else
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
                items.clear()  # not under the lock; and an idle lane keeps no request's image alive
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
                # Share with idle lanes. Not so what one turn runs; nor on a GPU, whose lanes are not cores, and which
                # wants the batch whole.
                if self.device == CPU and not self._fits_one_turn(station, len(station)):
                    most = min(most, -(-len(station) // (1 + self._idle)))
                station.turn = self._turn
                return station, station.take(most, priority)
        return None

    def _choose(self, priority: Priority) -> Station[Item] | None:
        # The stations come shallowest first. Of those that are due the last, so the deepest, is taken: a request
        # that is nearly done leaves before another is begun. Where none is due, the first: its results may fill
        # the batch of a station behind it.
        first: Station[Item] | None = None
        due: list[Station[Item]] = []
        overdue = time.monotonic() - MAX_FILL_WAIT_S
        for station in self._stations:
            if station.one_at_a_time and station.in_flight:
                continue
            head = station.peek(priority)
            if head is not None:
                first = first or station
                if len(station) >= station.batch or head.since < overdue:
                    due.append(station)
        if not due:
            return first
        return due[-1] if self._turn % FAIR_EVERY else min(due, key=lambda station: station.turn)
