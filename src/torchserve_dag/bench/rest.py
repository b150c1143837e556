"""Requests over REST, at little cost: the load generator shares the machine with the server that it measures.

On 2 cores, 32 clients of a server that does nothing: 57 us of CPU a request with an answer of 0.5 kB and 98 us with one
of 106 kB; a parser of our own in Python took 65 and 125, h11 some 200 more. All connections receive into one buffer:
asyncio by itself allocates 256 KiB each time, which took another 50 us.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from urllib.parse import urlsplit

from torchserve_dag.bench.http_answer import AnswerReader
from torchserve_dag.bench.sender import LOST, TOO_LATE, UNREACHABLE, Answer, Done, Sender

_CHECK_EVERY_S = 0.25
"""How often requests that exceed the time limit are looked for: cheaper than a timer for each."""
_BUFFER_BYTES = 256 * 2**10


class RestSender(Sender):
    """As many connections as there are requests at once; each is kept open, and carries one request at a time.

    `headers` are sent with every request, and override the default ones. Raises ValueError for an address that does
    not begin with http://.
    """

    def __init__(self, address: str, headers: dict[str, str], bodies: Sequence[bytes], limit_s: float) -> None:
        url = urlsplit(address)
        if url.scheme != "http" or not url.hostname:
            raise ValueError(f"{address} is not an address that begins with http://")
        self.address = (url.hostname, url.port or 80)
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        self.requests = [_request(target, url.netloc, headers, body) for body in bodies]
        self.loop = asyncio.get_running_loop()
        self.idle: list[_Connection] = []
        self.buffer = bytearray(_BUFFER_BYTES)
        """What was received last, on any connection: the event loop hands it over before it receives more."""
        self.received = memoryview(self.buffer)
        self._limit_s = limit_s
        self._connections: set[_Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._timer = self.loop.call_later(_CHECK_EVERY_S, self._check)

    def send(self, body: int, done: Done) -> None:
        # The connection used last is the least likely to have been closed by the server for being idle.
        if self.idle:
            self.idle.pop().send(body, done, self.loop.time())
        else:
            self.open(body, done, self.loop.time())

    async def close(self) -> None:
        self._timer.cancel()
        for task in self._opening:
            task.cancel()
        for connection in tuple(self._connections):
            connection.drop()
        await asyncio.sleep(0)

    def open(self, body: int, done: Done, sent: float) -> None:
        """Send over a new connection."""
        task = self.loop.create_task(self._open(body, done, sent))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def forget(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)

    async def _open(self, body: int, done: Done, sent: float) -> None:
        try:
            connecting = self.loop.create_connection(lambda: _Connection(self), *self.address)
            _, connection = await asyncio.wait_for(connecting, self._limit_s)
        except (OSError, asyncio.TimeoutError):
            done(Answer(0, reason=UNREACHABLE))
            return
        self._connections.add(connection)
        connection.send(body, done, sent)

    def _check(self) -> None:
        oldest = self.loop.time() - self._limit_s
        for connection in tuple(self._connections):
            if connection.sent < oldest:
                connection.give_up()
        self._timer = self.loop.call_later(_CHECK_EVERY_S, self._check)


class _Connection(asyncio.BufferedProtocol):
    def __init__(self, sender: RestSender) -> None:
        self._sender = sender
        self._reader = AnswerReader()
        self._transport: asyncio.Transport | None = None
        self._done: Done | None = None
        self._body = 0
        self._used = False
        """Whether it has carried an answer."""
        self.sent = float("inf")
        """When the outstanding request was sent, in the event loop's seconds; infinite without one."""

    def send(self, body: int, done: Done, sent: float) -> None:
        self._body, self._done, self.sent = body, done, sent
        if self._transport is not None:
            self._transport.write(self._sender.requests[body])

    def give_up(self) -> None:
        self._end(Answer(0, reason=TOO_LATE))
        self.drop()

    def drop(self) -> None:
        self._done = None
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"{transport} cannot be written to")
        self._transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        del sizehint
        return self._sender.buffer

    def buffer_updated(self, nbytes: int) -> None:
        try:
            answer = self._reader.feed(self._sender.received[:nbytes])
        except ValueError as error:
            self._end(Answer(0, reason=str(error)))
            self.drop()
            return
        if answer is None or self._done is None:
            return
        self._used = True
        if answer.keep_alive:
            self._sender.idle.append(self)
        elif self._transport is not None:
            self._transport.close()
        self._end(Answer(answer.status, answer.content))

    def connection_lost(self, error: Exception | None) -> None:
        del error
        self._sender.forget(self)
        done = self._done
        if done is None:
            return
        answer = self._reader.closed()
        if answer is not None:
            self._end(Answer(answer.status, answer.content))
        elif self._used and not self._reader.begun:  # closed as idle, while the request was on its way
            self._sender.open(self._body, done, self.sent)
        else:
            self._end(Answer(0, reason=LOST))

    def _end(self, answer: Answer) -> None:
        done, self._done, self.sent = self._done, None, float("inf")
        if done is not None:
            done(answer)


def _request(target: str, host: str, headers: dict[str, str], body: bytes) -> bytes:
    fields = {"host": host, "content-type": "application/octet-stream", "content-length": str(len(body))}
    fields |= {name.lower(): value for name, value in headers.items()}
    lines = [f"POST {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body
