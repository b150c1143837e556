"""The interfaces of code that runs items: a Runner answers a batch, or the next chunks; a Starter answers later."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Protocol

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.data.declared import As, WrongTypeError
from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.handler import EngineLoad
from torchserve_dag.runtime.messages import Failure, InputError

logger = logging.getLogger(__name__)

Runner = Callable[[Sequence[Any]], Sequence[Any]]
"""Returns an answer for each item of a batch, in order; a Failure for an item without one. For code that is called by
parameter names, an item is a dict."""

Done = Callable[[Any], None]
"""Called from any thread, once with an answer or a Failure; or with Chunks, and then with END or a Failure."""

Cancel = Callable[[], None]
"""Cancels an item that runs elsewhere. It may be called after the item has been answered."""

Release = Callable[[], None]
"""Gives back what was reserved for an item. It may be called twice."""

Reserved = Callable[[Release | Failure], None]
"""Called from any thread, or at once, when something was reserved for an item, or it is refused."""

Starter = Callable[[Any, Options, Done], Cancel]
"""Starts one item elsewhere: its value, the options of its call, which always have a time limit, and the callback for
its answer. Does not block."""

Deliver = Callable[[Mapping[int, Any]], None]
"""Called, from any thread, with what there is for items of a batch, by their places in it: each item gets an answer or
a Failure once, or Chunks and then END."""

BatchStarter = Callable[[Sequence[tuple[str, Any]], Deliver], None]
"""Starts a batch elsewhere: for each item, its request's id and its value. Does not block. The next batch starts when
each item of the last has been answered."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """An answer for an item that streams: the next chunk, and the stream for the chunk after it."""

    value: Any
    stream: Stream | None = None
    """None where the next chunk comes without being asked for."""


@dataclass(frozen=True, slots=True)
class Stream:
    """The value of a streaming node's item, once its first chunk is there."""

    chunks: Iterator[Any]
    inputs: Any = None
    """What another attempt begins with, where this one may fail before its first chunk."""


class ChunkSource(Protocol):
    """The chunks of another node, which a function takes as they come."""

    @property
    def ready(self) -> bool:
        """Whether there is a chunk to take, or their end."""


@dataclass(frozen=True, slots=True)
class Waits:
    """An answer for an item that goes on once its source has another chunk."""

    stream: Stream
    source: ChunkSource


@dataclass(frozen=True, slots=True)
class OwnEngine:
    """The engine of a model that batches by itself."""

    name: str
    model: str
    """The name of its model's handler."""
    room: int
    """How many items may be in progress."""
    load_now: Callable[[], EngineLoad]
    reserve: Callable[[Any, str | None, Reserved], None]
    """Reserves what an item of a client needs, before it waits for a place."""


END: Final = object()
"""A runner's answer after the last chunk."""


def function_runner(name: str, answer: Callable[[Any], Any], as_declared: As | None = None) -> Runner:
    """A runner that calls `answer` for each item; an exception fails its own item only.

    `as_declared` looks at each answer; one of another type fails its item.
    """
    if as_declared:
        call, check = answer, as_declared

        def answer(item: Any) -> Any:
            return check(call(item))

    def run(items: Sequence[Any]) -> list[Any]:
        return [_guarded(name, answer, item) for item in items]

    return run


def stream_runner(name: str, begin: Callable[[Any], Iterator[Any]], as_declared: As | None = None) -> Runner:
    """A runner for a generator function: each call returns the next chunk of every item."""

    def step(item: Any) -> Any:
        stream = item if isinstance(item, Stream) else Stream(iter(begin(item)))
        chunk = next(stream.chunks, END)
        if chunk is END:
            return END
        return Chunk(as_declared(chunk) if as_declared else chunk, stream)

    def run(items: Sequence[Any]) -> list[Any]:
        return [_guarded(name, step, item) for item in items]

    return run


def feed_runner(
    name: str,
    begin: Callable[[Any], AsyncIterator[Any]],
    as_declared: As | None = None,
    *,
    feeds: Collection[str],
) -> Runner:
    """A runner for an async generator function over other nodes' chunks: each call goes on to its next chunk, or to
    where it waits for one of theirs. `feeds`: its parameters that take chunks.
    """

    def begin_stream(inputs: Mapping[str, Any]) -> Stream:
        taken = {parameter: aiter(inputs[parameter]) for parameter in feeds}
        return Stream(_Steps(begin({**inputs, **taken}), name), inputs)

    def step(item: Any) -> Any:
        stream = item if isinstance(item, Stream) else begin_stream(item)
        chunk = next(stream.chunks, END)
        if chunk is END:
            return END
        if isinstance(chunk, _Wanted):
            return Waits(stream, chunk.source)
        return Chunk(as_declared(chunk) if as_declared else chunk, stream)

    def run(items: Sequence[Any]) -> list[Any]:
        return [_guarded(name, step, item) for item in items]

    return run


@dataclass(frozen=True, slots=True)
class _Wanted:
    source: ChunkSource


class WaitFor:
    """What a source's `__anext__` awaits where it has no chunk yet."""

    def __init__(self, source: ChunkSource) -> None:
        self._source = source

    def __await__(self) -> Generator[_Wanted, None, None]:
        yield _Wanted(self._source)


class _Steps(Iterator[Any]):
    """An async generator, driven without an event loop: all that it awaits are its sources."""

    def __init__(self, chunks: AsyncIterator[Any], name: str) -> None:
        self._chunks, self._name = chunks, name
        self._next: Generator[Any, None, Any] | None = None
        """Its next chunk, on which it is at work."""

    def __next__(self) -> Any:
        self._next = self._next or self._chunks.__anext__().__await__()
        try:
            wanted = self._next.send(None)
        except StopIteration as done:
            self._next = None
            return done.value
        except StopAsyncIteration:
            raise StopIteration from None
        if isinstance(wanted, _Wanted):
            return wanted
        raise RuntimeError(f"{self._name} awaits something other than the chunks that it takes")


def internal_error(node: str, fault: str) -> Failure:
    return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, f"{node} failed.", "InternalError", node, fault)


def _guarded(name: str, work: Callable[[Any], Any], item: Any) -> Any:
    """The value of `work(item)`, or the Failure that its exception becomes."""
    try:
        return work(item)
    except InputError as error:
        return Failure(error.status, error.message, error.type)
    except WrongTypeError as error:
        return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, str(error), "WrongType")
    except BaseException as error:  # noqa: BLE001 (a lane must not end, whatever a function raises)
        fault = logs.report(logger, error, f"{name} raised", line=False)
        return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, f"{name} failed.", "InternalError", fault=fault)
