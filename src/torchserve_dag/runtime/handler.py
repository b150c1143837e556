"""The contract of a handler: one model's code, as its author writes it."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

if TYPE_CHECKING:  # it imports torch
    from torchserve_dag.runtime.compute.placement import Placement

Item = TypeVar("Item")
"""One item's input: a message."""
Prepared = TypeVar("Prepared")
"""The model's input for the item, made by `preprocess`."""
Output = TypeVar("Output")
"""The model's output for the item."""
Answer = TypeVar("Answer")
"""The answer for the item: a message."""


@dataclass(frozen=True, slots=True)
class NoSettings:
    """The settings of a handler that has none."""


class Handler(Generic[Item, Prepared, Output, Answer]):
    """The code of a model. Subclass it in `handlers/NAME.py`, beside its card, `handlers/NAME.yaml`.

        class Brightness(Handler[Photo, float, float, Label]):
            def load(self, folder: Path, settings: NoSettings, placement: Placement) -> None:
                self.limit = 127.5

            def example(self) -> Photo:
                return Photo(Image.new("RGB", (8, 8), "white"))

            def preprocess(self, item: Photo) -> float:
                return ImageStat.Stat(item.image.convert("L")).mean[0]

            def infer(self, batch: Sequence[float]) -> list[float]:
                return [value / 255 for value in batch]

            def postprocess(self, output: float, item: Photo) -> Label:
                return Label("bright" if output > 0.5 else "dark", output)

    A handler is a plain object that needs no server: `h = Brightness(); h.load(...); h.preprocess(photo)`.

    The stages run in several threads at once. So a stage may read `self` but must not write it, and returns what the
    next stage needs. An item that cannot be served raises InputError, in any stage.
    """

    Settings: ClassVar[type] = NoSettings
    """A frozen dataclass: the keys that `settings:` in the handler's YAML may have."""

    warms_up: bool = True
    """Whether the example is run at the start. `load` may set it to False, where what is asked may be away."""

    def load(self, folder: Path, settings: Any, placement: Placement) -> None:
        """Make the model ready. `folder` holds the weights; put modules in place with `placement.put`."""
        raise NotImplementedError

    def example(self) -> Item:
        """A typical item. It warms the model up, and serves as a test and as documentation."""
        raise NotImplementedError

    def preprocess(self, item: Item) -> Prepared:
        """The item as the model's input."""
        raise NotImplementedError

    def infer(self, batch: Sequence[Prepared]) -> Sequence[Output]:
        """The model's outputs for a batch, one for each item, in order."""
        raise NotImplementedError

    def stream(self, prepared: Prepared) -> Iterator[Output]:
        """Instead of `infer`: the outputs for an item, one after another; `postprocess` makes a chunk of each.

        The chunks of several items take turns, so all their clients get chunks at the same time.
        """
        raise NotImplementedError

    def postprocess(self, output: Output, item: Item) -> Answer:
        """The answer for one item."""
        raise NotImplementedError


Chunk_contra = TypeVar("Chunk_contra", contravariant=True)
AnswerChunkT = TypeVar("AnswerChunkT")


class Reply(Protocol[Chunk_contra]):
    """Where a model with an engine of its own puts the answer to one item.

    The methods may be called from any thread; they neither block nor raise. After `end` or `fail`, or once the item is
    cancelled, they do nothing.
    """

    def chunk(self, chunk: Chunk_contra) -> None:
        """The next part of the answer."""

    def end(self) -> None:
        """The last chunk was given."""

    def fail(self, error: BaseException) -> None:
        """There will be no more: an InputError with its status and sentence, any other exception as 500."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine has to do now."""

    running: int = 0
    """Items that it computes."""
    waiting: int = 0
    """Items that it has accepted and does not compute yet."""
    cache_usage: float | None = None
    """The part of its cache that is in use, 0 to 1; None if it cannot tell."""
    engine: str = "custom"
    """The engine's name, which stays the same."""


class ContinuousHandler(Generic[Item, AnswerChunkT]):
    """The code of a model whose engine batches by itself: it accepts an item at any time, beside those in progress.

        class Echo(ContinuousHandler[Text, Text]):
            room = 16

            def load(self, folder: Path, settings: NoSettings, placement: Placement) -> None:
                self.engine = SomeEngine(folder)

            def example(self) -> Text:
                return Text("Hello")

            def start(self, item: Text, reply: Reply[Text]) -> Callable[[], None]:
                return self.engine.add(item.text, on_word=lambda word: reply.chunk(Text(word)), on_end=reply.end)

    Items are not held for a batch: each is started at once, as long as fewer than `room` are in progress. Its chunks go
    to the client, and to the nodes that follow, as they come.
    """

    Settings: ClassVar[type] = NoSettings
    """A frozen dataclass: the keys that `settings:` in the handler's YAML may have."""

    room: int = 16
    """How many items may be in progress; `load` may set it."""
    warms_up: bool = True
    """Whether the example is run at the start. `load` may set it to False, for a model that costs money or may be away.
    """

    def load(self, folder: Path, settings: Any, placement: Placement) -> None:
        """Make the model ready. `folder` holds the weights."""
        raise NotImplementedError

    def example(self) -> Item:
        """A typical item. It warms the model up, and serves as a test and as documentation."""
        raise NotImplementedError

    def reserve(self, item: Item, client: str | None) -> Callable[[], None]:  # noqa: ARG002 (for those that count)
        """Reserve what an item will need, before it waits for a place, and return what gives that back.

        `client` is the name of the front door's token with which the item came, so that one client cannot have it all.

        Raises InputError to refuse the item at once; OverloadedError, or the status 429, says that it may come again.
        What is returned is called when the item has ended, whether it was started or not; it may be called twice.
        """
        return _nothing

    def start(self, item: Item, reply: Reply[AnswerChunkT]) -> Callable[[], None]:
        """Start an item without waiting for its answer, and return what cancels it.

        Raises InputError for an item that cannot be served. The cancel function may be called from any thread, more
        than once, and after the answer.
        """
        raise NotImplementedError

    def load_now(self) -> EngineLoad:
        """What the engine has to do now, for metrics."""
        return EngineLoad()

    def hangs(self) -> bool:
        """Whether the engine makes no progress with what it has, and its process has to be started again."""
        return False

    def close(self) -> None:
        """End the engine, with the threads and processes that it started."""


def _nothing() -> None:
    """Nothing was reserved."""


AnyHandler = Handler[Any, Any, Any, Any] | ContinuousHandler[Any, Any]
HANDLERS = (Handler, ContinuousHandler)
"""The classes of which a handler's file defines one subclass."""


def streams(kind: type[AnyHandler]) -> bool:
    """Whether a handler answers in chunks."""
    return issubclass(kind, ContinuousHandler) or kind.stream is not Handler.stream


def types_of(kind: type[AnyHandler]) -> tuple[Any, Any]:
    """The types of a handler's input and answer, or of one chunk, from the annotations of its methods.

    Raises TypeError if they are not annotated.
    """
    if issubclass(kind, ContinuousHandler):
        hints = typing.get_type_hints(kind.start)
        takes, gives = hints.get("item"), (*typing.get_args(hints.get("reply")), None)[0]
        where_given = "start does not say what its chunks are; annotate its parameter `reply`, like Reply[Text]"
        where_taken = "start"
    else:
        takes = typing.get_type_hints(kind.preprocess).get("item")
        gives = typing.get_type_hints(kind.postprocess).get("return")
        where_given = "postprocess does not say what it answers; annotate its result"
        where_taken = "preprocess"
    if takes is None or isinstance(takes, TypeVar):
        raise TypeError(f"{kind.__name__}.{where_taken} does not say what an item is; annotate its parameter `item`")
    if gives is None or isinstance(gives, TypeVar):
        raise TypeError(f"{kind.__name__}.{where_given}")
    return takes, gives
