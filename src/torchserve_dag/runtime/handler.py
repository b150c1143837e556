"""The contract of a handler: one model's code, as its author writes it."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

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


def streams(kind: type[Handler[Any, Any, Any, Any]]) -> bool:
    """Whether a handler answers in chunks."""
    return kind.stream is not Handler.stream


def types_of(kind: type[Handler[Any, Any, Any, Any]]) -> tuple[Any, Any]:
    """The types of a handler's input and answer, from the annotations of its stages.

    Raises TypeError if they are not annotated.
    """
    takes = typing.get_type_hints(kind.preprocess).get("item")
    gives = typing.get_type_hints(kind.postprocess).get("return")
    if takes is None or isinstance(takes, TypeVar):
        raise TypeError(f"{kind.__name__}.preprocess does not say what an item is; annotate its parameter `item`")
    if gives is None or isinstance(gives, TypeVar):
        raise TypeError(f"{kind.__name__}.postprocess does not say what it answers; annotate its result")
    return takes, gives
