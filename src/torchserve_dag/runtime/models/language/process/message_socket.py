"""Python objects over a socket between two processes of ours, both ways at any time."""

from __future__ import annotations

import contextlib
import pickle
import select
import socket
import struct
import threading
from typing import Any

_HEAD = struct.Struct("!Q")
_READ = 1 << 18


class MessageSocket:
    """Sending never waits; it may be called from any thread, and so may receiving."""

    def __init__(self, link: socket.socket) -> None:
        """`link`: a stream between this process and one that is trusted, for what it sends is unpickled."""
        link.settimeout(0)
        self._link = link
        self._unsent = bytearray()
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._received = bytearray()

    @property
    def unsent(self) -> int:
        """Bytes that the other end has not had room for; `wait` sends them on."""
        return len(self._unsent)

    def wait(self, within_s: float | None, wake: socket.socket | None = None) -> None:
        """Wait for something to receive, for room for what is unsent, or for `wake`, which is emptied."""
        poll = select.poll()  # not select, which knows the first 1,024 descriptors only
        poll.register(self._link, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        if wake is not None:
            poll.register(wake, select.POLLIN)
        ready = dict(poll.poll(None if within_s is None else 1000 * within_s))
        if wake is not None and wake.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                wake.recv(1 << 12)
        self._push()

    def send(self, message: object) -> None:
        """Send a message, or as much of it as there is room for. If the other end is closed, `receive` says so."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with self._sending:
            self._unsent += _HEAD.pack(len(data)) + data
        self._push()

    def _push(self) -> None:
        with self._sending:
            try:
                while self._unsent:
                    del self._unsent[: self._link.send(self._unsent)]
            except BlockingIOError:
                pass
            except OSError:  # it is closed
                self._unsent.clear()

    def receive(self) -> list[Any]:
        """The messages that have come, perhaps none. Raises EOFError where the other end is closed."""
        with self._receiving:
            ended = False
            while not ended:
                try:
                    data = self._link.recv(_READ)
                except BlockingIOError:
                    break
                except OSError:
                    data = b""
                self._received += data
                ended = not data
            messages = self._messages()
        if ended and not messages:
            raise EOFError
        return messages

    def _messages(self) -> list[Any]:
        messages, at = [], 0
        with memoryview(self._received) as view:
            while len(view) - at >= _HEAD.size:
                begin = at + _HEAD.size
                end = begin + _HEAD.unpack_from(view, at)[0]
                if end > len(view):
                    break
                messages.append(pickle.loads(view[begin:end]))  # noqa: S301 (of a process of ours)
                at = end
        del self._received[:at]
        return messages
