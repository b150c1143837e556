"""The network side of the direct host: uvicorn, with httptools and uvloop, on a socket that listens already."""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn
import uvloop

from torchserve_dag.direct.app import DirectApp

BACKLOG = 2048
IDLE_S = 75
"""How long a connection without a request is kept."""
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


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on uvloop's event loop."""
    uvloop.run(main)


async def serve(app: DirectApp, listening: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
    """Serve a socket until SIGTERM or SIGINT; then take no more requests, and answer those in progress."""
    config = uvicorn.Config(
        app,
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        ws="none",
        http="httptools",
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=DRAIN_S,
    )
    server = _Server(config)
    server.ready = ready
    await server.serve(sockets=[listening])


class _Server(uvicorn.Server):
    """Calls `ready` once it takes requests."""

    ready: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()
