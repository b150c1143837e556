"""A loaded handler whose model has an engine of its own: items start at once, and their chunks come when they come."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.data.declared import As, WrongTypeError
from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.engine.runner import END, Cancel, Chunk, Done, OwnEngine
from torchserve_dag.runtime.handler import ContinuousHandler
from torchserve_dag.runtime.messages import Failure, InputError

logger = logging.getLogger(__name__)

WARM_UP_S = 300.0
"""How long a handler's own example may take."""
_CANCELLED = Failure(499, "The item was cancelled.", "Cancelled")


class ContinuousModel:
    """A Starter. Safe to call from several threads at once."""

    def __init__(
        self, name: str, handler: ContinuousHandler[Any, Any], device: str, as_declared: As | None = None
    ) -> None:
        """`as_declared` looks at each chunk; one of another type fails its item."""
        self.name, self.handler, self.device = name, handler, device
        self._as_declared = as_declared or (lambda chunk: chunk)

    @property
    def room(self) -> int:
        """How many items may be in progress."""
        return self.handler.room

    @property
    def own_engine(self) -> OwnEngine:
        return OwnEngine(self.handler.load_now().engine, self.name, self.room, self.handler.load_now)

    @property
    def hangs(self) -> bool:
        return self.handler.hangs()

    def __call__(self, value: Any, options: Options, done: Done) -> Cancel:  # noqa: ARG002 (a Starter)
        """Start one item. `done` gets its Chunks, and then END or a Failure."""
        reply = ItemReply(self.name, self._as_declared, done)
        try:
            cancel = self.handler.start(value, reply)
        except BaseException as error:  # noqa: BLE001 (libraries raise SystemExit, and Rust's panics are no Exception)
            reply.fail(error)
            return reply.cancel
        return reply.cancelled_by(cancel)

    def warm_up(self) -> None:
        """Run the handler's own example. Raises RuntimeError if it fails."""
        ended, last = threading.Event(), [None]

        def done(answer: Any) -> None:
            last[0] = answer
            if not isinstance(answer, Chunk):
                ended.set()

        cancel = self(self.handler.example(), Options(), done)
        if not ended.wait(WARM_UP_S):
            cancel()
            raise RuntimeError(f"{self.name} did not end its own example within {WARM_UP_S:g} s")
        if isinstance(last[0], Failure):
            raise RuntimeError(f"{self.name} failed on its own example: {last[0].message}")  # noqa: TRY004 (a value)

    def close(self) -> None:
        self.handler.close()


class ItemReply:
    """The reply to one item, which ends once."""

    def __init__(self, name: str, as_declared: As, done: Done) -> None:
        self._name, self._as_declared, self._done = name, as_declared, done
        self._ended = False
        self._lock = threading.Lock()
        self._cancel: Callable[[], None] = _nothing

    def chunk(self, chunk: Any) -> None:
        if self._ended:
            return
        try:
            value = self._as_declared(chunk)
        except WrongTypeError as error:
            self._cancel()
            self._end(Failure(HTTPStatus.INTERNAL_SERVER_ERROR, str(error), "WrongType"))
        else:
            self._done(Chunk(value))

    def end(self) -> None:
        self._end(END)

    def fail(self, error: BaseException) -> None:
        if isinstance(error, InputError):
            self._end(Failure(error.status, error.message, error.type))
            return
        fault = logs.report(logger, error, f"{self._name}: the engine raised", line=False)
        message = f"{self._name} failed."
        self._end(Failure(HTTPStatus.INTERNAL_SERVER_ERROR, message, "HandlerError", fault=fault))

    def cancelled_by(self, cancel: Callable[[], None]) -> Cancel:
        """What cancels the item, given what cancels it in the engine."""
        self._cancel = cancel
        return self.cancel

    def cancel(self) -> None:
        self._cancel()
        self._end(_CANCELLED)

    def _end(self, answer: Any) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
        self._done(answer)


def _nothing() -> None:
    """The item was never started."""
