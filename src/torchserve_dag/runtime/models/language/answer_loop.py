"""Answers that are tasks of one thread's event loop, so that many streams cost little."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from torchserve_dag.runtime.handler import Reply
from torchserve_dag.runtime.messages import InputError, OverloadedError, TextChunk
from torchserve_dag.runtime.models.language.engine import Cancel

CLOSE_S = 5.0
CLIENT_CLOSED = 499
"""What servers write into their logs for a client that has left."""


class AnswerLoop:
    """The answers in progress. Each reply is ended, or failed, exactly once, however its answer's task ends."""

    def __init__(self, name: str) -> None:
        self._open: set[Future[None]] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """How many are in progress."""
        return len(self._open)

    @property
    def runs(self) -> bool:
        """Whether its thread does, until `close`."""
        return self._closed or self._thread.is_alive()

    def start(
        self,
        answer: Coroutine[Any, Any, None],
        reply: Reply[TextChunk],
        most: int,
        on_end: Callable[[], None] = lambda: None,
    ) -> Cancel:
        """Run `answer`, which gives the chunks of `reply` and raises what it fails with, and return what cancels it.

        `on_end` is called once, before the reply ends, also where the answer is cancelled before it begins. Raises
        OverloadedError if `most` are in progress.
        """
        with self._lock:
            if self._closed or len(self._open) >= most:
                answer.close()
                raise OverloadedError("The model has too many requests waiting for it; try again in a few seconds.")
            future = asyncio.run_coroutine_threadsafe(answer, self._loop)
            self._open.add(future)
        future.add_done_callback(lambda future: self._done(future, reply, on_end))
        return lambda: _cancel(future)

    def close(self, last: Callable[[], Awaitable[None]] | None = None) -> None:
        """Cancel what is in progress, run `last` in the loop, and end the thread."""
        with self._lock:
            closed, self._closed = self._closed, True
            still_open = list(self._open)
        if closed:
            return
        for future in still_open:
            future.cancel()
        with suppress(TimeoutError, asyncio.TimeoutError):
            asyncio.run_coroutine_threadsafe(_end_tasks(last), self._loop).result(CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()

    def _done(self, future: Future[None], reply: Reply[TextChunk], on_end: Callable[[], None]) -> None:
        on_end()
        with self._lock:
            self._open.discard(future)
        if future.cancelled():
            closed = OverloadedError("The model is being closed; try again in a few seconds.")
            reply.fail(closed if self._closed else InputError("The request was cancelled.", CLIENT_CLOSED))
        elif error := future.exception():
            reply.fail(error)
        else:
            reply.end()


def _cancel(future: Future[None]) -> None:
    future.cancel()


async def _end_tasks(last: Callable[[], Awaitable[None]] | None) -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    await asyncio.gather(*others, return_exceptions=True)
    if last:
        await last()
