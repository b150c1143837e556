"""One process computes for several of TorchServe's workers, so that it has several batches at a time.

TorchServe (0.12.0) hands a worker the next batch when the last request of the one before is answered; until then
requests wait, and cores that have nothing left of that batch idle. So an archive may ask for more workers than it
wants processes with a model (`serve.batches`). The first that comes loads the model and is the **host**. Each other is
a **guest**: it hands its connection with TorchServe to the host, and then is a process of a few MB that waits for the
host to end. Where either ends, TorchServe finds its connections closed, and starts what ended again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

LOOK_EVERY_S = 0.1
_WAIT = "import os, sys; os.read(int(sys.argv[1]), 1)"


class Host:
    """The process with the model."""

    def __init__(self, folder: Path, place: int, lock: int) -> None:
        self._folder, self._place, self._lock = folder, place, lock
        self._guests = 0

    def open(self, serve: Callable[[socket.socket], None]) -> None:
        """The model is loaded: take guests in from now on. `serve` answers one's connection until it ends."""
        listener = socket.socket(socket.AF_UNIX)
        with _address(self._folder, self._place) as address:
            Path(address).unlink(missing_ok=True)  # of one that has ended
            listener.bind(address)
        listener.listen()
        threading.Thread(target=self._take_in, args=(listener, serve), name="guests", daemon=True).start()

    def _take_in(self, listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        while True:
            link, _ = listener.accept()
            threading.Thread(target=self._look_after, args=(link, serve), name="guest", daemon=True).start()

    def _look_after(self, link: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        with link, contextlib.suppress(OSError):
            link.sendall(bytes([min(self._guests, 255)]))
            _, fds, *_ = socket.recv_fds(link, 1, 1)
            if not fds:  # it has found a host with fewer
                return
            self._guests += 1
            with socket.socket(fileno=fds[0]) as connection:
                watch = threading.Thread(target=_close_at_end, args=(link, connection), daemon=True)
                watch.start()
                try:
                    serve(connection)
                finally:
                    self._guests -= 1


class Guest:
    """A process that has no model."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def hand_over(self, connection: socket.socket) -> NoReturn:
        """Give TorchServe's connection to the host, and end with it."""
        socket.send_fds(self._link, [b"\0"], [connection.fileno()])
        self._link.set_inheritable(True)
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", _WAIT, str(self._link.fileno())])  # noqa: S606


def join(folder: Path, hosts: int, within_s: float) -> Host | Guest:
    """Become one of so many hosts, or the guest of the one with the fewest, when it is ready.

    `folder` is one that all workers of the archive have. Raises TimeoutError.
    """
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        for place in range(hosts):
            lock = os.open(folder / f"host-{place}.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
            except BlockingIOError:
                os.close(lock)
            else:
                return Host(folder, place, lock)
        guest = _guest(folder, hosts)
        if guest:
            return guest
        time.sleep(LOOK_EVERY_S)
    raise TimeoutError(f"no worker of {folder} was ready within {within_s:g} s")


def _guest(folder: Path, hosts: int) -> Guest | None:
    links: list[tuple[int, int, socket.socket]] = []
    for place in range(hosts):
        link = socket.socket(socket.AF_UNIX)
        try:
            with _address(folder, place) as address:
                link.connect(address)
            guests = link.recv(1)
        except OSError:
            guests = b""
        if guests:
            links.append((guests[0], place, link))
        else:
            link.close()
    for _, _, link in sorted(links)[1:]:
        link.close()
    return Guest(min(links)[2]) if links else None


@contextmanager
def _address(folder: Path, place: int) -> Iterator[str]:
    """A socket's path, through a descriptor of its folder: a socket's address has at most 107 characters."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/host-{place}.sock"
    finally:
        os.close(descriptor)


def _close_at_end(link: socket.socket, connection: socket.socket) -> None:
    """A guest that is ended takes its connection with it, as any worker does."""
    with contextlib.suppress(OSError):
        link.recv(1)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
