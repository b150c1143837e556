"""A loaded handler whose model has an engine of its own: items start at once, and their chunks come when they come."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.data.declared import As, WrongTypeError
from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.engine.runner import END, Cancel, Chunk, Done, OwnEngine, Release, Reserved
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
        # To start an item is to split its prompt into tokens. The threads that find a place free must not wait for
        # that: they step the engine, or tell that clients have left, often many at once.
        self._starting = ThreadPoolExecutor(1, thread_name_prefix=f"{name} start")

    @property
    def room(self) -> int:
        """How many items may be in progress."""
        return self.handler.room

    @property
    def own_engine(self) -> OwnEngine:
        return OwnEngine(self.handler.load_now().engine, self.name, self.room, self.handler.load_now, self.reserve)

    @property
    def hangs(self) -> bool:
        return self.handler.hangs()

    def __call__(self, value: Any, options: Options, done: Done) -> Cancel:  # noqa: ARG002 (a Starter)
        """Start one item, soon. `done` gets its Chunks, and then END or a Failure."""
        reply = ItemReply(self.name, self._as_declared, done)
        self._starting.submit(self._start, value, reply)
        return reply.cancel

    def _start(self, value: Any, reply: ItemReply) -> None:
        if reply.ended:  # it was cancelled while it waited
            return
        try:
            reply.cancelled_by(self.handler.start(value, reply))
        except BaseException as error:  # noqa: BLE001 (libraries raise SystemExit, and Rust's panics are no Exception)
            reply.fail(error)

    def reserve(self, value: Any, client: str | None, done: Reserved) -> None:
        """Reserve what an item needs, soon; `done` gets what gives it back, or the Failure of a refused item."""
        self._starting.submit(self._reserve, value, client, done)

    def _reserve(self, value: Any, client: str | None, done: Reserved) -> None:
        reserved: Release | Failure
        try:
            reserved = self.handler.reserve(value, client)
        except BaseException as error:  # noqa: BLE001 (as above)
            reserved = failure_of(error, self.name)
        done(reserved)

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
        self._starting.shutdown(wait=False)
        self.handler.close()


class ItemReply:
    """The reply to one item, which ends once."""

    def __init__(self, name: str, as_declared: As, done: Done) -> None:
        self._name, self._as_declared, self._done = name, as_declared, done
        self.ended = self._cancelled = False
        self._lock = threading.Lock()
        self._cancel: Callable[[], None] = _nothing

    def chunk(self, chunk: Any) -> None:
        if self.ended:
            return
        try:
            value = self._as_declared(chunk)
        except WrongTypeError as error:
            self._cancel_in_engine()
            self._end(Failure(HTTPStatus.INTERNAL_SERVER_ERROR, str(error), "WrongType"))
        else:
            self._done(Chunk(value))

    def end(self) -> None:
        self._end(END)

    def fail(self, error: BaseException) -> None:
        self._end(failure_of(error, self._name))

    def cancelled_by(self, cancel: Callable[[], None]) -> None:
        """What cancels the item in the engine. It is called at once if the item was cancelled while it was started."""
        with self._lock:
            self._cancel = cancel
            cancelled = self._cancelled
        if cancelled:
            cancel()

    def cancel(self) -> None:
        self._cancel_in_engine()
        self._end(_CANCELLED)

    def _cancel_in_engine(self) -> None:
        with self._lock:
            self._cancelled = True
        self._cancel()

    def _end(self, answer: Any) -> None:
        with self._lock:
            if self.ended:
                return
            self.ended = True
        self._done(answer)


def failure_of(error: BaseException, name: str) -> Failure:
    """The failure of an item, from what the handler `name` raised."""
    if isinstance(error, InputError):
        return Failure(error.status, error.message, error.type)
    fault = logs.report(logger, error, f"{name}: the engine raised", line=False)
    return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, f"{name} failed.", "HandlerError", fault=fault)


def _nothing() -> None:
    """The item was never started."""
