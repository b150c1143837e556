"""A queue in which requests take turns, however many items each of them has."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

from torchserve_dag.runtime.data.options import Options


class ClientRequest(Protocol):
    """A client's request; the queue is fair between these."""

    @property
    def options(self) -> Options: ...


class Owner(Protocol):
    """The request that an item belongs to: the client's, or a sub-workflow's."""

    @property
    def id(self) -> str: ...
    @property
    def root(self) -> ClientRequest: ...


class Queued(Protocol):
    """What a queue needs to know of an item."""

    value: Any
    since: float
    """When the item was queued, on time.monotonic()'s clock."""

    @property
    def request(self) -> Owner: ...
    @property
    def obsolete(self) -> bool:
        """Whether nobody waits for the item's answer any more."""


ItemT = TypeVar("ItemT", bound=Queued)


class FairQueue(Generic[ItemT]):
    """Items of one node, of requests of one priority. Not locked: the engine's lock is held while it is used.

    The rank of a request's next item is one more than that of its last, and more than the rank of the item taken
    last. So if a request with a thousand items and a request with a single item wait, the single item is second
    in line at the latest. (Start-time fair queueing, Goyal et al., 1997, with every item the same length.)
    """

    def __init__(self, dropped: list[ItemT], *, by_token: bool = False) -> None:
        """Obsolete items go to `dropped`, which the caller clears without the lock.

        Dropping the last reference to a stream runs the `finally` of a user's generator. `by_token`: tokens of the
        front door take turns, instead of requests.
        """
        self._dropped = dropped
        self._by_token = by_token
        self.heap: list[tuple[int, int, ItemT]] = []
        """The queued items, by rank."""
        self._order = itertools.count()
        self._ranks: dict[ClientRequest | str, int] = {}
        """For each request, or token, with items in the queue: the rank of its last item."""
        self._now = 0

    def push(self, item: ItemT) -> None:
        client = self._client(item)
        rank = max(self._ranks.get(client, 0), self._now) + 1
        self._ranks[client] = rank
        heapq.heappush(self.heap, (rank, next(self._order), item))

    def peek(self) -> ItemT | None:
        """The next item, without taking it. Obsolete items before it are dropped."""
        while self.heap and self.heap[0][2].obsolete:
            self._dropped.append(self._pop())
        return self.heap[0][2] if self.heap else None

    def take(self, most: int, fits: Callable[[ItemT], bool] = lambda _: True) -> list[ItemT]:
        """Take up to `most` items. One that does not fit stays; `fits` is called once for each that might be taken."""
        items: list[ItemT] = []
        staying: list[tuple[int, int, ItemT]] = []
        while self.heap and len(items) < most:
            if self.heap[0][2].obsolete:
                self._dropped.append(self._pop())
            elif fits(self.heap[0][2]):
                items.append(self._pop())
            else:
                staying.append(heapq.heappop(self.heap))
        for entry in staying:
            heapq.heappush(self.heap, entry)
        return items

    def drop_obsolete(self) -> None:
        """Drop the obsolete items, at any position in the queue."""
        waiting: Iterable[ItemT] = [item for _, _, item in sorted(self.heap, key=lambda entry: entry[:2])]
        self.heap, self._ranks = [], {}
        for item in waiting:
            if item.obsolete:
                self._dropped.append(item)
            else:
                self.push(item)

    def _client(self, item: ItemT) -> ClientRequest | str:
        root = item.request.root
        return (self._by_token and root.options.token) or root

    def _pop(self) -> ItemT:
        rank, _, item = heapq.heappop(self.heap)
        self._now = rank
        client = self._client(item)
        if self._ranks.get(client) == rank:  # no other item of this request waits
            del self._ranks[client]
        return item
