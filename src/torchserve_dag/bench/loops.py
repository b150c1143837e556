"""Closed loops, whose clients wait for their answers, and open loops, whose arrivals wait for nothing."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from functools import partial

from torchserve_dag.bench.sender import Answer, Sender
from torchserve_dag.bench.window import Window

PAUSE_S = 0.1
"""How long a client of a closed loop waits after a failed request."""
MOST_OUTSTANDING = 2000
"""The most outstanding requests of an open loop; further arrivals count as not sent."""


class Loop(ABC):
    """Sends requests until it is stopped, the bodies in turn."""

    def __init__(self, sender: Sender, window: Window, bodies: int) -> None:
        self._sender = sender
        self._window = window
        self._bodies = bodies
        self._next = 0
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        self._outstanding = 0
        self.steady = asyncio.Event()
        """Set when the load has reached its steady state."""
        self.quiet = asyncio.Event()
        """Set when the loop is stopped and no request is outstanding."""

    @abstractmethod
    def start(self) -> None:
        """Begin to send requests."""

    def stop(self) -> None:
        """Send no more requests."""
        self._stopped = True
        self._check_quiet()

    def _send(self, began: float) -> None:
        body = self._next
        self._next = (body + 1) % self._bodies
        self._outstanding += 1
        self._sender.send(body, partial(self._ended, body, began))

    def _ended(self, body: int, began: float, answer: Answer) -> None:
        self._outstanding -= 1
        self._window.ended(body, self._loop.time() - began, answer)
        if self._stopped:
            self._check_quiet()

    def _check_quiet(self) -> None:
        if not self._outstanding:
            self.quiet.set()


class ClosedLoop(Loop):
    """A number of clients, each of which sends its next request as soon as its last is answered."""

    def __init__(self, sender: Sender, window: Window, bodies: int, clients: int) -> None:
        super().__init__(sender, window, bodies)
        self._clients = clients
        self._began = 0.0
        self._without_answer = clients
        """The clients that wait for their first answer. When every client has one, answers arrive evenly."""

    def start(self) -> None:
        self._began = self._loop.time()
        for _ in range(self._clients):
            self._send(self._began)

    def _ended(self, body: int, began: float, answer: Answer) -> None:
        super()._ended(body, began, answer)
        if began == self._began:
            self._without_answer -= 1
            if not self._without_answer:
                self.steady.set()
        if self._stopped:
            return
        if answer.ok:
            self._send(self._loop.time())
        else:
            self._loop.call_later(PAUSE_S, self._again)

    def _again(self) -> None:
        if not self._stopped:
            self._send(self._loop.time())


class OpenLoop(Loop):
    """Poisson arrivals at `rate` a second, the same for the same `seed`.

    A latency is counted from the planned arrival, so that a delayed load generator hides no waiting time.
    """

    def __init__(self, sender: Sender, window: Window, bodies: int, rate: float, seed: int) -> None:
        super().__init__(sender, window, bodies)
        self._rate = rate
        self._random = random.Random(seed)  # noqa: S311 (no secret)
        self._planned = 0.0

    def start(self) -> None:
        self._planned = self._loop.time()
        self.steady.set()
        self._arrive()

    def _arrive(self) -> None:
        """Send the requests whose arrival is due, and schedule the next arrival."""
        if self._stopped:
            return
        now = self._loop.time()
        while self._planned <= now:
            if self._outstanding < MOST_OUTSTANDING:
                self._window.sent(now - self._planned)
                self._send(self._planned)
            else:
                self._window.could_not_send()
            self._planned += self._random.expovariate(self._rate)
        self._loop.call_at(self._planned, self._arrive)
