"""The threads of one device, and which batch each takes next.

On a CPU there is one lane a core: it takes items side by side with its neighbours, and never so many that one
of them idles. A lane that finds no full batch does the work that may fill one, and only then takes what
there is: a lone request never waits for company, and under load batches fill by themselves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from torchserve_dag.runtime.data.options import Priority
from torchserve_dag.runtime.engine.request import Item
from torchserve_dag.runtime.engine.station import CPU, Station, shallow_first

PATIENCE_S = 0.05
"""How long an item may wait for its batch to fill while a lane has other work to do."""

BULK_TURN = 8
"""Every so many batches a bulk request goes before the interactive ones, so that it is not starved."""

FAIR_TURN = 5
"""Every so many batches the node goes first that has waited the most turns, so that one with thousands of items does
not keep the others' from theirs."""

Run = Callable[[Station, list[Item]], None]

SetAlone = Callable[[bool], None]
"""Told in a lane's thread, before each batch, whether no other lane had anything to do when it was taken."""


class Lanes:
    """`run` is called with each batch, in a lane's thread; `lock` is the engine's."""

    def __init__(
        self,
        name: str,
        device: str,
        count: int,
        stations: Sequence[Station],
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
        """By lane: since when it is in a node, and with which items; none when it has just left it."""
        self._kept: dict[int, tuple[Station, list[Item]]] = {}
        """By lane: what it goes on with."""
        self.threads = [
            threading.Thread(target=self._lane, name=f"{name}-{device}-{i}", daemon=True) for i in range(count)
        ]
        for thread in self.threads:
            thread.start()

    def put(self, station: Station, items: list[Item], *, only: bool) -> None:
        """New work, and whether it is all that there is at the moment. Under the lock."""
        me = threading.get_ident()
        one_turn = self._one_turn(station, len(items))
        if only and one_turn and self._goes_on(me, station):
            self._kept[me] = (station, items)
            return
        station.put(items)
        if self._idle:
            turns = 1 if one_turn else len(items)
            # A lane that has just ended a batch takes the next one itself: waking another for it costs more.
            self._work.notify(turns - 1 if me in self.busy else turns)

    def _goes_on(self, me: int, station: Station) -> bool:
        """Whether the calling thread is a lane that may go on with this itself, without a queue in between.

        Nothing that waits would go before it.
        """
        return (
            me in self.busy
            and me not in self._kept
            and not any(len(other) and other.depth >= station.depth for other in self._stations)
        )

    def _one_turn(self, station: Station, items: int) -> bool:
        """Whether one lane does them, as quick functions, in a turn.

        Not where there is an idle lane for each of them: then none waits for another, should that not be quick.
        """
        return station.bundle and items <= station.size and not 1 < items <= 1 + self._idle

    def close(self) -> None:
        """Under the lock."""
        self._closed = True
        self._work.notify_all()

    def _lane(self) -> None:
        me = threading.get_ident()
        left: Station | None = None
        while True:
            with self._lock:
                if left is not None:
                    del self.busy[me]
                    left.under_way -= 1
                    if left.one_at_a_time and len(left):
                        self._work.notify()  # it was passed over meanwhile, and this lane may take something else
                    left = None
                while not self._closed and (taken := self._take()) is None and not self._dropped:
                    self._idle += 1
                    self._work.wait()
                    self._idle -= 1
                if self._closed:
                    return
                if taken:
                    station, items = taken
                    station.under_way += 1
                    more = bool(self._idle or not self.busy) and any(map(len, self._stations))
                    alone = not self.busy and not more
                    if self._idle and more:
                        self._work.notify()  # what one batch has set free may be more than it woke lanes for
                    self.busy[me] = (time.monotonic(), items)
            self._dropped.clear()
            if taken:
                self._set_alone(alone)
                self._run(station, items)
                items.clear()  # not under the lock; and an idle lane holds nobody's photo
                left = station

    def _take(self) -> tuple[Station, list[Item]] | None:
        """The next batch, under the lock."""
        kept = self._kept.pop(threading.get_ident(), None)
        if kept:
            return kept
        self._turn += 1
        order: tuple[Priority, Priority] = ("interactive", "bulk")
        if self._turn % BULK_TURN == 0:
            order = ("bulk", "interactive")
        for priority in order:
            station = self._chosen(priority)
            if station is not None:
                size = station.size
                # Share with the idle; not what one turn does, and a GPU's lanes are not cores, and want it whole.
                if self.device == CPU and not self._one_turn(station, len(station)):
                    size = min(size, -(-len(station) // (1 + self._idle)))
                station.turn = self._turn
                return station, station.take(size, priority)
        return None

    def _chosen(self, priority: Priority) -> Station | None:
        # The stations come shallowest first. Of those that are due the last, so the deepest, is taken: a request
        # that is nearly done leaves before another is begun. Where none is due, the first: its results may fill
        # the batch of one behind it.
        first: Station | None = None
        due: list[Station] = []
        patience = time.monotonic() - PATIENCE_S
        for station in self._stations:
            if station.one_at_a_time and station.under_way:
                continue
            head = station.head(priority)
            if head is not None:
                first = first or station
                if len(station) >= station.batch or head.since < patience:
                    due.append(station)
        if not due:
            return first
        return due[-1] if self._turn % FAIR_TURN else min(due, key=lambda station: station.turn)
