"""A streaming answer on its way to the client: chunks in order, no faster than the client takes them, then the end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any, Generic, Protocol, TypeVar

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.engine.gather import Gather
from torchserve_dag.runtime.engine.runner import internal_error
from torchserve_dag.runtime.messages import Failure

logger = logging.getLogger(__name__)

MAX_UNTAKEN = 16
"""How many chunks a node that yields may be ahead of its client. So many keep a lane at work while the host serves
others; 64 were no faster. It bounds also the chunks whose bytes are unknown yet, because a node that follows has them.
"""
MAX_UNTAKEN_BYTES = 2**20
"""While a client has this many bytes of chunks to take, the node is not asked for another. The socket's buffers hold as
much again, so that a client that reads is not kept waiting."""
UNPACED_BYTES = 16 * 2**20
"""How many bytes a client may leave of chunks that cannot be held back, because they come from a process that has other
requests too, or from a list that is complete before its first chunk may leave. The request of a client that leaves more
ends."""

SendChunk = Callable[[Any, Callable[[], None]], int]
"""Gets a chunk, and what to call once the client has taken it, from any thread. Returns the chunk's size in bytes."""


class Streamed(Protocol):
    """The request whose answer streams."""

    @property
    def id(self) -> str: ...
    @property
    def on_answer(self) -> Callable[[Any], None]:
        """Gives the client what is left of the answer, or a Failure, after the last chunk."""

    def fail(self, failure: Failure) -> None: ...


class Yielding(Protocol):
    """The item of the node that yields."""

    answers: list[Any]
    since: float


ItemT = TypeVar("ItemT", bound=Yielding)


class AnswerStream(Generic[ItemT]):
    """Sends the chunks of a request's answer to the client, each once and in order.

    Only one thread sends at a time: another thread leaves its chunks to it, so chunks never overtake each other.
    What is left of the answer follows the last chunk that is ready.

    The item that yields waits here between two chunks, and occupies nothing. It goes on at once while the client has
    fewer than MAX_UNTAKEN chunks and MAX_UNTAKEN_BYTES to take.
    """

    def __init__(
        self,
        node: str,
        on_chunk: SendChunk,
        lock: threading.Lock,
        resume: Callable[[ItemT], None],
        *,
        keeps: bool = False,
    ) -> None:
        """`node` is the node whose chunks the answer consists of; `lock` is the engine's; `resume` queues an item;
        `keeps`: whether all chunks are kept.
        """
        self._node = node
        self._on_chunk = on_chunk
        self._lock = lock
        self._resume = resume
        self.first_sent: float | None = None
        """When the first chunk was sent, on time.monotonic()'s clock."""
        self._keeps, self._kept = keeps, list[Any]()
        self._gather: Gather | None = None
        self._sent = 0
        self._untaken: dict[int, int] = {}
        """The size of each chunk that was sent and that the client has not taken, by its index."""
        self._untaken_bytes = 0
        self._waiting: list[ItemT] = []
        """The item that waits, if it does."""
        self._paced = False
        """Whether the node that yields waits between two chunks."""
        self._sending = False
        self._answer: tuple[Any] | None = None

    # Under the engine's lock.

    def open(self, gather: Gather) -> None:
        """The node has started, and its chunks come into `gather`. Only the first call counts."""
        self._gather = self._gather or gather

    def wait(self, item: ItemT) -> None:
        """Keep the item that has just yielded until there is room for another chunk: `send` says whether there is."""
        self._waiting, self._paced = [item], True

    def close(self, answer: Any, dropped: list[ItemT]) -> None:
        """The request is answered, with an answer or a Failure; `send` sends it to the client.

        An item that waits goes to `dropped`, with its last reference: see FairQueue.
        """
        self._answer = ([] if isinstance(answer, list) else answer,)  # all of a list has left in chunks
        if self._waiting:
            dropped.append(self._waiting.pop())

    # Without the lock.

    def send(self, request: Streamed) -> ItemT | None:
        """Send the client the chunks that are ready, and then what is left of the answer, if the request is answered.

        Returns the item that yields, if it waited and there is room for another chunk: the caller queues it.
        """
        while True:
            with self._lock:
                chunks = [] if self._sending else self._take_chunks()
                if not chunks:
                    answer = None if self._sending else self._take_answer()
                    item = self._take_waiting()
                    break
                self._sending = True
            failure = self._send_chunks(request, chunks)
            with self._lock:
                self._sending = False
                if failure:
                    self._gather, self._answer = None, (failure,)
        if answer:
            self._gather = None  # a caller may keep the request, but not its images
            request.on_answer(answer[0])
        return item

    def take_kept(self) -> list[Any]:
        """The chunks that were sent, once the answer has ended and if they are kept."""
        kept, self._kept = self._kept, []
        return kept

    def _send_chunks(self, request: Streamed, chunks: Sequence[tuple[int, Any]]) -> Failure | None:
        """Returns the failure with which the request ends where a chunk cannot be sent."""
        try:
            self.first_sent = self.first_sent or time.monotonic()
            for index, chunk in chunks:
                if self._keeps:
                    self._kept.append(chunk)
                size = self._on_chunk(chunk, partial(self._take, index))
                with self._lock:
                    if index in self._untaken:
                        self._untaken[index] = size
                        self._untaken_bytes += size
        except plain.UnwritableError as error:
            message = f"A chunk cannot be written: {error.at(self._node)}."
            failure = Failure(HTTPStatus.INTERNAL_SERVER_ERROR, message, "InternalError", self._node)
            logger.error("request %s: %s", request.id, message)  # noqa: TRY400 (the sentence says all)
        except BaseException as error:  # noqa: BLE001 (a lane must not end)
            fault = logs.report(logger, error, f"request {request.id}: a chunk could not be sent to the client")
            failure = internal_error(self._node, fault)
        else:
            if self._paced or self._untaken_bytes <= UNPACED_BYTES:
                return None
            failure = UNREAD
        request.fail(failure)
        return failure

    def _take(self, index: int) -> None:
        """The client has taken a chunk."""
        with self._lock:
            self._untaken_bytes -= self._untaken.pop(index, 0)
            # While a chunk is being sent, nobody knows its size: whoever sends it then looks whether there is room.
            item = None if self._sending else self._take_waiting()
        if item:
            self._resume(item)

    # Under the lock.

    def _take_chunks(self) -> list[tuple[int, Any]]:
        chunks = self._gather.ready_from(self._sent) if self._gather else []
        self._sent += len(chunks)
        self._untaken.update((index, 0) for index, _ in chunks)
        return chunks

    def _take_answer(self) -> tuple[Any] | None:
        answer, self._answer = self._answer, None
        return answer

    def _take_waiting(self) -> ItemT | None:
        """The item that waits, if there is room for another chunk."""
        if not self._waiting or self._untaken_bytes >= MAX_UNTAKEN_BYTES:
            return None
        (item,) = self._waiting
        taken = self._sent - len(self._untaken)
        if len(item.answers) - taken >= MAX_UNTAKEN:
            return None
        self._waiting = []
        item.since = time.monotonic()
        return item


UNREAD = Failure(
    499,
    f"The client left more than {UNPACED_BYTES // 2**20} MB of the answer unread, whose chunks cannot be held back.",
    "Cancelled",
)
