"""The network side of the direct host: uvicorn, with httptools and uvloop, on a socket that listens already."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from torchserve_dag.direct.app import DirectApp

BACKLOG = 2048
IDLE_S = 75
"""How long a connection without a request is kept."""
DRAIN_S = 30
"""How long requests in progress may take after SIGTERM or SIGINT."""


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
