"""A streaming answer on its way to the client: chunks in order, from one thread at a time, and then the end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Protocol

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.engine.gather import Gather
from torchserve_dag.runtime.engine.runner import internal_error
from torchserve_dag.runtime.messages import Failure

logger = logging.getLogger(__name__)


class Streamed(Protocol):
    """The request whose answer streams."""

    @property
    def id(self) -> str: ...
    @property
    def on_answer(self) -> Callable[[Any], None]:
        """Gives the client the whole answer or a Failure, after the last chunk."""

    def fail(self, failure: Failure) -> None: ...


class AnswerStream:
    """Sends the chunks of a request's answer to the client, each once and in order.

    Only one thread sends at a time: another thread leaves its chunks to it, so chunks never overtake each other.
    The whole answer follows the last chunk that is ready.
    """

    def __init__(self, node: str, on_chunk: Callable[[Any], None], lock: threading.Lock) -> None:
        """`node` is the node whose chunks the answer consists of; `lock` is the engine's."""
        self._node = node
        self._on_chunk = on_chunk
        self._lock = lock
        self._gather: Gather | None = None
        self._sent = 0
        self._sending = False
        self._answer: tuple[Any] | None = None

    def open(self, gather: Gather) -> None:
        """The node has started, and its chunks come into `gather`. Under the lock; only the first call counts."""
        self._gather = self._gather or gather

    def close(self, answer: Any) -> None:
        """The request is answered, with an answer or a Failure; `send` sends it to the client. Under the lock."""
        self._answer = (answer,)

    def send(self, request: Streamed) -> None:
        """Send the client the chunks that are ready, and then the whole answer, if the request is answered."""
        while True:
            with self._lock:
                if self._sending:
                    return
                chunks = self._take_chunks()
                self._sending = bool(chunks)
                answer = None if chunks else self._take_answer()
            if answer:
                request.on_answer(answer[0])
            if not chunks:
                return
            try:
                for chunk in chunks:
                    self._on_chunk(chunk)
                failure = None
            except plain.UnwritableError as error:
                message = f"A chunk cannot be written: {error.at(self._node)}."
                failure = Failure(HTTPStatus.INTERNAL_SERVER_ERROR, message, "InternalError", self._node)
                logger.error("request %s: %s", request.id, message)  # noqa: TRY400 (the sentence says all)
                request.fail(failure)
            except BaseException as error:  # noqa: BLE001 (a lane must not end)
                fault = logs.report(logger, error, f"request {request.id}: a chunk could not be sent to the client")
                failure = internal_error(self._node, fault)
                request.fail(failure)
            with self._lock:
                self._sending = False
                if failure:
                    self._gather, self._sent, self._answer = Gather([]), 0, (failure,)

    def _take_chunks(self) -> list[Any]:
        chunks = [chunk for _, chunk in self._gather.ready_from(self._sent)] if self._gather else []
        self._sent += len(chunks)
        return chunks

    def _take_answer(self) -> tuple[Any] | None:
        answer, self._answer = self._answer, None
        return answer
