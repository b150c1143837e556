"""One process computes for several of TorchServe's workers, so that it gets several batches at a time.

TorchServe (0.12.0) sends a worker the next batch only when the last request of the previous batch is answered. Until
then requests wait while cores idle that the batch no longer needs. So an archive may ask for more workers than
processes with a model (`serve.batches`). The first worker that starts loads the model, and is the **leader**. Every
other worker is a **follower**: it hands its connection with TorchServe to the leader, and becomes a process of a few MB
that waits for the leader to end. When a leader or a follower ends, TorchServe finds its connections closed, and starts
it again.
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

from torchserve_dag.runtime.worker.torchserve import follower as follower_program

RETRY_S = 0.1
"""Seconds until a worker that found no leader looks for one again."""


class Leader:
    """The process with the model."""

    def __init__(self, folder: Path, place: int) -> None:
        self._folder, self._place = folder, place
        self._followers = 0

    def open(self, serve: Callable[[socket.socket], None]) -> None:
        """Accept followers, once the model is loaded. `serve` answers a follower's connection until it closes."""
        listener = socket.socket(socket.AF_UNIX)
        with _address(self._folder, self._place) as address:
            Path(address).unlink(missing_ok=True)  # the socket file of a leader that has ended
            listener.bind(address)
        listener.listen()
        threading.Thread(target=self._accept_followers, args=(listener, serve), name="followers", daemon=True).start()

    def _accept_followers(self, listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        while True:
            link, _ = listener.accept()
            threading.Thread(target=self._serve_follower, args=(link, serve), name="follower", daemon=True).start()

    def _serve_follower(self, link: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        with link, contextlib.suppress(OSError):
            link.sendall(bytes([min(self._followers, 255)]))
            _, fds, *_ = socket.recv_fds(link, 1, 1)
            if not fds:  # the worker has chosen a leader with fewer followers
                return
            self._followers += 1
            with socket.socket(fileno=fds[0]) as connection:
                watch = threading.Thread(target=_close_with_follower, args=(link, connection), daemon=True)
                watch.start()
                try:
                    serve(connection)
                finally:
                    self._followers -= 1


class Follower:
    """A process without a model."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def hand_over(self, connection: socket.socket) -> NoReturn:
        """Give TorchServe's connection to the leader, and end when the leader ends."""
        socket.send_fds(self._link, [b"\0"], [connection.fileno()])
        self._link.set_inheritable(True)
        program = [sys.executable, "-I", "-S", str(follower_program.__file__), str(self._link.fileno())]
        os.execv(sys.executable, program)  # noqa: S606


def join(folder: Path, leaders: int, within_s: float) -> Leader | Follower:
    """Become one of `leaders` leaders, or a follower of the leader that has the fewest, as soon as a leader is ready.

    `folder` is the same for all workers of the archive. Raises TimeoutError.
    """
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        for place in range(leaders):
            if _take_place(folder, place):
                return Leader(folder, place)
        if follower := _find_leader(folder, leaders):
            return follower
        time.sleep(RETRY_S)
    raise TimeoutError(f"no worker of {folder} was ready within {within_s:g} s")


def _take_place(folder: Path, place: int) -> bool:
    """Lock a leader's place. False if another process holds the lock.

    The lock is never released: the descriptor stays open, and the kernel drops the lock when this process ends, for
    whatever reason. So a place is free exactly when its leader has ended.
    """
    lock = os.open(folder / f"leader-{place}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return False
    return True


def _find_leader(folder: Path, leaders: int) -> Follower | None:
    links: list[tuple[int, int, socket.socket]] = []
    for place in range(leaders):
        link = socket.socket(socket.AF_UNIX)
        try:
            with _address(folder, place) as address:
                link.connect(address)
            followers = link.recv(1)
        except OSError:
            followers = b""
        if followers:
            links.append((followers[0], place, link))
        else:
            link.close()
    for _, _, link in sorted(links)[1:]:
        link.close()
    return Follower(min(links)[2]) if links else None


@contextmanager
def _address(folder: Path, place: int) -> Iterator[str]:
    """A socket's path through a descriptor of its folder, because a socket's address has at most 107 characters."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/leader-{place}.sock"
    finally:
        os.close(descriptor)


def _close_with_follower(link: socket.socket, connection: socket.socket) -> None:
    """Close a follower's connection when the follower ends, as it would be with any worker."""
    with contextlib.suppress(OSError):
        link.recv(1)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
