"""The network side of the direct host: uvicorn, with httptools and uvloop, on a socket that listens already."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

BACKLOG = 2048
IDLE_S = 75
"""How long a connection without a request is kept."""
BEHIND_ENVOY_S = 86_400
"""The same behind Envoy, which closes idle connections earlier: else one could be closed as a request comes over it."""
DRAIN_S = 30
"""How long requests in progress may take after SIGTERM or SIGINT."""


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address of IPv4; port 0 is any. Raises OSError."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Without it the body, which is written after the headers, waits 40 ms for their acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    return listening


def listen_at(path: Path) -> socket.socket:
    """A Unix socket. Its folder may have a path that is too long for a socket. Raises OSError."""
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    folder = os.open(path.parent, os.O_PATH)
    try:
        listening.bind(f"/proc/self/fd/{folder}/{path.name}")
    except OSError:
        listening.close()
        raise
    finally:
        os.close(folder)
    return listening


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on uvloop's event loop."""
    uvloop.run(main)


async def serve(
    app: Callable[..., Awaitable[None]],
    listening: socket.socket,
    ready: Callable[[Callable[[], None]], None] = lambda _: None,
    *,
    drains_on: Collection[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
    idle_s: int = IDLE_S,
) -> None:
    """Serve an ASGI application on a socket until one of the signals `drains_on`; then answer what is in progress.

    `ready` is called once it takes requests, with a function that does the same as a signal, from any thread. A
    connection without a request is closed after `idle_s` seconds.
    """
    config = uvicorn.Config(
        app,
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        log_config=None,
        server_header=False,
        ws="none",
        http="httptools",
        backlog=BACKLOG,
        timeout_keep_alive=idle_s,
        timeout_graceful_shutdown=DRAIN_S,
    )
    server = _Server(config)
    server.ready, server.drains_on = ready, drains_on
    await server.serve(sockets=[listening])


class _Server(uvicorn.Server):
    """Calls `ready` once it takes requests, and obeys the signals `drains_on` only."""

    ready: Callable[[Callable[[], None]], None]
    drains_on: Collection[signal.Signals]

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():  # where no signals come
            self.drains_on = ()
        for one in self.drains_on:
            loop.add_signal_handler(one, self._drain)
        try:
            yield
        finally:
            for one in self.drains_on:
                loop.remove_signal_handler(one)

    def _drain(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready(self._drain)
