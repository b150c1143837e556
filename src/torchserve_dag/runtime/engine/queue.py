"""A queue in which requests take turns, however many items each of them has."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
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


class ItemQueue(Protocol[ItemT]):
    """Items of one code, of requests of one priority. Not locked: the engine's lock is held while it is used."""

    def __len__(self) -> int: ...
    def push(self, item: ItemT) -> None: ...
    def peek(self) -> ItemT | None:
        """The next item, without taking it. Obsolete items before it are dropped."""

    def take(self, most: int) -> list[ItemT]:
        """Take up to `most` items."""

    def drop_obsolete(self) -> None:
        """Drop the obsolete items, at any position in the queue."""


class FairQueue(Generic[ItemT]):
    """An ItemQueue in which requests take turns.

    The rank of a request's next item is one more than that of its last, and more than the rank of the item taken
    last. So if a request with a thousand items and a request with a single item wait, the single item is second
    in line at the latest. (Start-time fair queueing, Goyal et al., 1997, with every item the same length.)
    """

    def __init__(self, dropped: list[ItemT]) -> None:
        """Obsolete items go to `dropped`, which the caller clears without the lock.

        Dropping the last reference to a stream runs the `finally` of a user's generator.
        """
        self._dropped = dropped
        self.heap: list[tuple[int, int, ItemT]] = []
        """The queued items, by rank."""
        self._order = itertools.count()
        self._ranks: dict[ClientRequest, int] = {}
        """For each request with items in the queue: the rank of its last item."""
        self._now = 0

    def __len__(self) -> int:
        return len(self.heap)

    def push(self, item: ItemT) -> None:
        client = item.request.root
        rank = max(self._ranks.get(client, 0), self._now) + 1
        self._ranks[client] = rank
        heapq.heappush(self.heap, (rank, next(self._order), item))

    def peek(self) -> ItemT | None:
        """The next item, without taking it. Obsolete items before it are dropped."""
        while self.heap and self.heap[0][2].obsolete:
            self._dropped.append(self._pop())
        return self.heap[0][2] if self.heap else None

    def take(self, most: int) -> list[ItemT]:
        """Take up to `most` items."""
        items: list[ItemT] = []
        while self.heap and len(items) < most:
            if self.heap[0][2].obsolete:
                self._dropped.append(self._pop())
            else:
                items.append(self._pop())
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

    def _pop(self) -> ItemT:
        rank, _, item = heapq.heappop(self.heap)
        self._now = rank
        client = item.request.root
        if self._ranks.get(client) == rank:  # no other item of this request waits
            del self._ranks[client]
        return item


class TokenQueue(Generic[ItemT]):
    """An ItemQueue for a model with an engine of its own: tokens of the front door take turns.

    Each token has a line of its own, and so has a request without one. A line whose items must wait
    costs the others nothing, however long it is.
    """

    def __init__(self, dropped: list[ItemT], fits: Callable[[ItemT], bool]) -> None:
        """`fits` is called once for each item that might be taken: one that does not fit keeps its whole line waiting.

        For `dropped` see FairQueue.
        """
        self._dropped, self._fits = dropped, fits
        self._lines: dict[ClientRequest | str, deque[ItemT]] = {}
        self._turns: list[tuple[int, int, ClientRequest | str]] = []
        """A heap: each line by the rank of its first item."""
        self._order = itertools.count()
        self._now = 0

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def push(self, item: ItemT) -> None:
        root = item.request.root
        client = root.options.token or root
        line = self._lines.get(client)
        if line is not None:
            line.append(item)
            return
        self._lines[client] = deque([item])
        heapq.heappush(self._turns, (self._now + 1, next(self._order), client))

    def peek(self) -> ItemT | None:
        while self._turns:
            if line := self._next_line():
                return line[0]
        return None

    def take(self, most: int) -> list[ItemT]:
        items: list[ItemT] = []
        staying: list[tuple[int, int, ClientRequest | str]] = []
        while self._turns and len(items) < most:
            line = self._next_line()
            if not line:
                continue
            rank, order, client = heapq.heappop(self._turns)
            if not self._fits(line[0]):
                staying.append((rank, order, client))
                continue
            items.append(line.popleft())
            self._now = rank
            heapq.heappush(self._turns, (rank + 1, next(self._order), client))
        for turn in staying:
            heapq.heappush(self._turns, turn)
        return items

    def drop_obsolete(self) -> None:
        for client, line in self._lines.items():
            self._dropped += [item for item in line if item.obsolete]
            self._lines[client] = deque(item for item in line if not item.obsolete)

    def _next_line(self) -> deque[ItemT]:
        """The line whose turn it is, without the obsolete items at its front. One that is empty then is no more."""
        client = self._turns[0][2]
        line = self._lines[client]
        while line and line[0].obsolete:
            self._dropped.append(line.popleft())
        if not line:
            heapq.heappop(self._turns)
            del self._lines[client]
        return line
