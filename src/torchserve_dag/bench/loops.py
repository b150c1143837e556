"""How requests follow one another: clients that wait for their answers, or arrivals that wait for nothing."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from functools import partial

from torchserve_dag.bench.sender import Answer, Sender
from torchserve_dag.bench.window import Window

PAUSE_S = 0.1
"""A client of a closed loop whose request failed waits before it asks again, as clients do."""
MOST_OUT = 2000
"""An open loop holds no more requests than this; further arrivals count as not sent."""


class Loop(ABC):
    """Requests that follow one another. The bodies are sent in turn."""

    def __init__(self, sender: Sender, window: Window, bodies: int) -> None:
        self._sender = sender
        self._window = window
        self._bodies = bodies
        self._next = 0
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        self._out = 0
        self.steady = asyncio.Event()
        """Set when the server is as busy with it as it will be."""
        self.quiet = asyncio.Event()
        """Set when it has stopped, and nothing is out."""

    @abstractmethod
    def start(self) -> None:
        """Begin to send."""

    def stop(self) -> None:
        """Send no more."""
        self._stopped = True
        self._look()

    def _send(self, began: float) -> None:
        body = self._next
        self._next = (body + 1) % self._bodies
        self._out += 1
        self._sender.send(body, partial(self._ended, body, began))

    def _ended(self, body: int, began: float, answer: Answer) -> None:
        self._out -= 1
        self._window.ended(body, self._loop.time() - began, answer)
        if self._stopped:
            self._look()

    def _look(self) -> None:
        if not self._out:
            self.quiet.set()


class ClosedLoop(Loop):
    """A number of clients, each of which sends its next request as soon as its last is answered."""

    def __init__(self, sender: Sender, window: Window, bodies: int, clients: int) -> None:
        super().__init__(sender, window, bodies)
        self._clients = clients
        self._began = 0.0
        self._waiting = clients
        """How many clients are without an answer. When none is, those that follow come evenly."""

    def start(self) -> None:
        self._began = self._loop.time()
        for _ in range(self._clients):
            self._send(self._began)

    def _ended(self, body: int, began: float, answer: Answer) -> None:
        super()._ended(body, began, answer)
        if began == self._began:
            self._waiting -= 1
            if not self._waiting:
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
    """Poisson arrivals at `rate` a second, alike for a `seed`.

    A latency is counted from the arrival as it was planned, so that a generator that is held up hides no wait.
    """

    def __init__(self, sender: Sender, window: Window, bodies: int, rate: float, seed: int) -> None:
        super().__init__(sender, window, bodies)
        self._rate = rate
        self._chance = random.Random(seed)  # noqa: S311 (no secret)
        self._planned = 0.0

    def start(self) -> None:
        self._planned = self._loop.time()
        self.steady.set()
        self._arrive()

    def _arrive(self) -> None:
        """Send all that is due, and come again for the next."""
        if self._stopped:
            return
        now = self._loop.time()
        while self._planned <= now:
            if self._out < MOST_OUT:
                self._window.sent(now - self._planned)
                self._send(self._planned)
            else:
                self._window.could_not_send()
            self._planned += self._chance.expovariate(self._rate)
        self._loop.call_at(self._planned, self._arrive)
