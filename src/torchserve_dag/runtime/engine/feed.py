"""The chunks of a node, for a function that takes them as they come, in an `async for`."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

from torchserve_dag.runtime.engine.gather import PENDING
from torchserve_dag.runtime.engine.request import Request
from torchserve_dag.runtime.engine.runner import WaitFor
from torchserve_dag.runtime.messages import Skipped


class Feed(AsyncIterable[Any]):
    """The chunks of one node, of one request, for each attempt from the first on. Of a skipped node there are none."""

    def __init__(self, request: Request, node: str) -> None:
        self._request, self._node = request, node

    def __aiter__(self) -> AsyncIterator[Any]:
        return _Chunks(self._request, self._node)


class _Chunks(AsyncIterator[Any]):
    """A ChunkSource.

    It reads without the engine's lock: answers are only ever added to a list, in the places that wait for them.
    """

    def __init__(self, request: Request, node: str) -> None:
        self._request, self._node = request, node
        self._taken = 0

    @property
    def ready(self) -> bool:
        """Whether there is a chunk to take, or their end."""
        answers, ended = self._answers()
        return ended or (self._taken < len(answers) and answers[self._taken] is not PENDING)

    async def __anext__(self) -> Any:
        while not self.ready:
            await WaitFor(self)
        answers, _ = self._answers()
        if self._taken >= len(answers):
            raise StopAsyncIteration
        self._taken += 1
        return answers[self._taken - 1]

    def _answers(self) -> tuple[list[Any], bool]:
        """The node's answers so far, and whether there will be no more."""
        if self._node in self._request.values:
            value = self._request.values[self._node]
            return ([] if isinstance(value, Skipped) else value), True
        gather = self._request.gathers.get(self._node)
        return (gather.answers if gather else []), False
