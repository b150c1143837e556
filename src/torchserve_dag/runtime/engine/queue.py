"""A queue in which requests take turns, however many items each of them has."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable

from torchserve_dag.runtime.engine.request import Item, Request


class FairQueue:
    """Items of one node, of requests of one priority. Not locked: the engine's lock holds while it is used.

    The rank of a request's next item is one more than that of its last, and at least that of what was taken
    last: so of two requests that wait, one with a thousand items and one with a single one, the second is
    next but one. (Start-time fair queueing, Goyal et al., 1997, with every item the same length.)
    """

    def __init__(self, dropped: list[Item]) -> None:
        """Items that nobody waits for any more go to `dropped`, to be let go of without the lock.

        Letting go of the last reference to a stream runs its `finally`.
        """
        self._dropped = dropped
        self.heap: list[tuple[int, int, Item]] = []
        """What waits, by rank."""
        self._order = itertools.count()
        self._ranks: dict[Request, int] = {}
        """Of the last item of each request that waits."""
        self._now = 0

    def put(self, item: Item) -> None:
        owner = item.request.root
        rank = max(self._ranks.get(owner, 0), self._now) + 1
        self._ranks[owner] = rank
        heapq.heappush(self.heap, (rank, next(self._order), item))

    def head(self) -> Item | None:
        """The next item, which stays. Items that nobody waits for any more are dropped on the way."""
        while self.heap and self.heap[0][2].over:
            self._dropped.append(self._pop())
        return self.heap[0][2] if self.heap else None

    def take(self, most: int) -> list[Item]:
        """The next items, at most `most`."""
        items: list[Item] = []
        while self.heap and len(items) < most:
            item = self._pop()
            (self._dropped if item.over else items).append(item)
        return items

    def drop_ended(self) -> None:
        """Let go of the items that nobody waits for any more."""
        alive: Iterable[Item] = [item for _, _, item in sorted(self.heap, key=lambda entry: entry[:2])]
        self.heap, self._ranks = [], {}
        for item in alive:
            if item.over:
                self._dropped.append(item)
            else:
                self.put(item)

    def _pop(self) -> Item:
        rank, _, item = heapq.heappop(self.heap)
        self._now = rank
        owner = item.request.root
        if self._ranks.get(owner) == rank:  # it was its last
            del self._ranks[owner]
        return item
