"""A client that leaves before its answer is there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


async def client_leaves(receive: Receive) -> None:
    """Wait until the client leaves. `receive` is ASGI's, after the whole body."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_client_stays(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives; None where the client leaves before, which cancels `work`."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(client_leaves(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
