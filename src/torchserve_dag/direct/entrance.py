"""Between the event loop and a model's threads: requests on their way in, chunks and answers on their way out.

What the event loop reads in one turn enters the model together, which costs less than one by one; and all that the
model's threads finish before the loop looks again comes back with one wake-up, in the order in which it was finished.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from torchserve_dag.runtime.worker.protocol import PendingResponse, Service, ServiceRequest, ServiceResponse

logger = logging.getLogger(__name__)

_BROKEN = ServiceResponse(
    b'{"code": 500, "type": "InternalError", "message": "The model did not take the request: its log says why."}',
    status=500,
)


SHARE = 7 / 8
"""The part of a worker's places that the requests of one token may take, so that there is room for others."""
TOKEN = "x-door-token"  # noqa: S105 (a header's name)


def _refusal(status: int, message: str, request_id: str) -> ServiceResponse:
    fields = {"code": status, "type": "Overloaded", "message": message, "request_id": request_id}
    return ServiceResponse(json.dumps(fields).encode(), status=status, headers={"Retry-After": "1"})


@dataclass(frozen=True, slots=True)
class AnswerChunk:
    """A part of an answer that streams."""

    body: bytes
    content_type: str
    taken: Callable[[], None]
    """To be called once the client has it: the model waits for a client that leaves its chunks."""


@dataclass(eq=False, slots=True)
class InFlight:
    """A request that has entered a model, as the event loop sees it. Its methods are called on the loop's thread."""

    request: ServiceRequest
    in_chunks: bool
    _cancelled: bool = False
    _pending: PendingResponse | None = None
    _arrived: deque[AnswerChunk | ServiceResponse] = field(default_factory=deque)
    _waiting: asyncio.Future[None] | None = None

    async def next(self) -> AnswerChunk | ServiceResponse:
        """The next chunk of the answer; last the response, which is all of an answer that does not stream."""
        while not self._arrived:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        return self._arrived.popleft()

    def cancel(self) -> None:
        """The client has left: what has not begun does not begin. The request's last item is a failure, then."""
        self._cancelled = True
        if self._pending:
            self._pending.cancel()

    def entered(self, pending: PendingResponse) -> None:
        self._pending = pending
        if self._cancelled:  # before it entered
            pending.cancel()

    def arrive(self, item: AnswerChunk | ServiceResponse) -> None:
        self._arrived.append(item)
        if self._waiting and not self._waiting.done():
            self._waiting.set_result(None)


class Entrance:
    """The way into one service, and out of it, for the requests of one event loop."""

    def __init__(self, service: Service, most: int | None = None) -> None:
        """To be called on the event loop's thread. `most` requests may be inside, or as many as the service takes."""
        self.service, self._most = service, most
        self._of_token: Counter[str] = Counter()
        """Requests that are not answered, by the token that the front door named."""
        self._loop = asyncio.get_running_loop()
        self.empty = asyncio.Event()
        """Set while no request is inside."""
        self.empty.set()
        self.inside = 0
        """Requests that are not answered."""
        self._entering: list[InFlight] = []
        self._lock = threading.Lock()
        self._finished: list[tuple[InFlight, AnswerChunk | ServiceResponse]] = []

    def submit(self, request: ServiceRequest, *, in_chunks: bool) -> InFlight:
        """Have a request enter the service with all others of this turn of the loop; one too many is refused."""
        in_flight = InFlight(request, in_chunks)
        if refusal := self._refusal(request):
            in_flight.arrive(refusal)
            return in_flight
        self._of_token[request.options.get(TOKEN, "")] += 1
        if not self._entering:
            self._loop.call_soon(self._enter)
        self._entering.append(in_flight)
        self.inside += 1
        self.empty.clear()
        return in_flight

    def _refusal(self, request: ServiceRequest) -> ServiceResponse | None:
        """Why a request is one too many, if it is."""
        if self._most is None:
            return None
        if self.inside >= self._most:
            message = f"{self._most:,} requests are in progress or wait here; try again in a second."
            return _refusal(503, message, request.id)
        token = request.options.get(TOKEN)
        share = max(1, int(SHARE * self._most))
        if token and self._of_token[token] >= share:
            message = f"{share:,} requests of this token are in progress or wait here; try again in a second."
            return _refusal(429, message, request.id)
        return None

    def _enter(self) -> None:
        entering, self._entering = self._entering, []
        with self.service.together():
            for in_flight in entering:
                self._submit(in_flight)

    def _submit(self, in_flight: InFlight) -> None:
        on_chunk = partial(self._send_chunk, in_flight) if in_flight.in_chunks else None
        try:
            pending = self.service.submit(in_flight.request, on_chunk)
        except Exception:  # whatever a service of another version raises
            logger.exception("request %s: the service raised", in_flight.request.id)
            in_flight.arrive(_BROKEN)
            self._leave(in_flight)
        else:
            pending.add_done_callback(partial(self._finish, in_flight))
            in_flight.entered(pending)

    # On a thread of the model's.

    def _send_chunk(self, in_flight: InFlight, body: bytes, content_type: str, taken: Callable[[], None]) -> None:
        self._finish(in_flight, AnswerChunk(body, content_type, taken))

    def _finish(self, in_flight: InFlight, item: AnswerChunk | ServiceResponse) -> None:
        with self._lock:
            first = not self._finished
            self._finished.append((in_flight, item))
        if first:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver)

    # On the loop's thread again.

    def _deliver(self) -> None:
        with self._lock:
            finished, self._finished = self._finished, []
        for in_flight, item in finished:
            in_flight.arrive(item)
            if isinstance(item, ServiceResponse):
                self._leave(in_flight)

    def _leave(self, in_flight: InFlight) -> None:
        self.inside -= 1
        token = in_flight.request.options.get(TOKEN, "")
        self._of_token[token] -= 1
        if not self._of_token[token]:
            del self._of_token[token]
        if not self.inside:
            self.empty.set()
