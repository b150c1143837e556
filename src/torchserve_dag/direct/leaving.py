"""A client that leaves before its answer is there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


async def while_client_stays(
    receive: Callable[[], Awaitable[Mapping[str, Any]]], work: Coroutine[Any, Any, T]
) -> T | None:
    """What `work` gives; None where the client leaves before, which cancels `work`.

    `receive` is ASGI's, after the whole body.
    """

    async def client_leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(client_leaves())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
