"""The kinds of code that a node can run, one class each; that of a sub-workflow is in graph.py.

A new kind adds its class here, the line of finder.py that makes it, and a case of `load_code` in models/load.py.
Everything else is decided by the class's attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torchserve_dag.runtime.data.source import Source
from torchserve_dag.runtime.handler import AnyHandler, ContinuousHandler
from torchserve_dag.runtime.project.handler_file import HandlerFile

DrawnAs = Literal["model", "function", "served", "workflow"]

MOST_ELSEWHERE = 64
"""The default limit of a node's items in flight elsewhere."""


class Kind:
    """What runs the items of a node, and how its kind differs from the others."""

    key: ClassVar[str]
    """The key of a workflow file that names such code."""
    noun: ClassVar[str]
    """What this kind is called in a sentence."""
    drawn_as: ClassVar[DrawnAs]
    by_name: ClassVar[bool] = False
    """Whether it is called with a value for each parameter by name, instead of with one value."""
    one_by_one: ClassVar[bool] = False
    """Whether the items of a batch run one after the other, so that batching them saves no computation."""
    elsewhere: ClassVar[bool] = False
    """Whether its items are only started, and answered later, so that they occupy none of the engine's threads."""
    continuous: ClassVar[bool] = False
    """Whether it is elsewhere, and gives the chunks of many items as they come, as many as it says that it has room
    for."""
    one_at_a_time: ClassVar[bool] = False
    """Whether it is elsewhere, and starts a batch only when its last batch has been answered."""
    is_model: ClassVar[bool] = False
    """Whether it is a model, so that the usage that its answers name is its own."""
    device: str | None = None
    """Where it computes, if that can be chosen: `auto`, `cpu` or `cuda:N`."""

    @property
    def title(self) -> str:
        """Its name in a picture, like `yolo_detector 1.0`."""
        raise NotImplementedError

    @property
    def reference(self) -> Any:
        """Its name as plain data, under `key`."""
        return self.title

    @property
    def files(self) -> frozenset[Path]:
        """The project's files that it consists of."""
        return frozenset()

    @property
    def batch(self) -> int:
        """The default batch size; for other code elsewhere, the default limit of items in flight."""
        return MOST_ELSEWHERE if self.elsewhere and not self.one_at_a_time else 1


@dataclass(frozen=True, slots=True)
class HandlerCode(Kind):
    """A handler of the project."""

    key = "handler"
    noun = "a handler"
    drawn_as = "model"
    is_model = True

    file: Source[HandlerFile]
    device: str = "auto"

    @property
    def title(self) -> str:
        return f"{self.file.value.name} {self.file.value.version}"

    @property
    def reference(self) -> str:
        return f"{self.file.value.name}/{self.file.value.version}"

    @property
    def files(self) -> frozenset[Path]:
        return frozenset({self.file.path, self.file.path.parent / self.file.value.code_file})

    @property
    def batch(self) -> int:
        return self.file.value.run.batch


@dataclass(frozen=True, slots=True)
class ContinuousCode(HandlerCode):
    """A handler of the project whose model has an engine of its own."""

    noun = "a handler with an engine of its own"
    elsewhere = True
    continuous = True

    @property
    def batch(self) -> int:
        """No limit of the graph's: the engine says how many items it has room for."""
        return 0


def handler_code(kind: type[AnyHandler]) -> type[HandlerCode]:
    """The kind of code that a handler's class is."""
    return ContinuousCode if issubclass(kind, ContinuousHandler) else HandlerCode


@dataclass(frozen=True, slots=True)
class FunctionCode(Kind):
    """A function, called with the node's values by name, one item at a time."""

    key = "function"
    noun = "a function"
    drawn_as = "function"
    by_name = True
    one_by_one = True

    function: Callable[..., Any]

    @property
    def title(self) -> str:
        return self.function.__name__


@dataclass(frozen=True, slots=True)
class DecodeCode(Kind):
    """The decoding of a request, which the engine runs before the nodes. It is in no graph, so nothing draws it."""

    one_by_one = True


@dataclass(frozen=True, slots=True)
class ServedCode(Kind):
    """A model of another server, called over gRPC."""

    key = "served"
    noun = "a served model"
    drawn_as = "served"
    elsewhere = True
    is_model = True

    name: str
    version: str | None
    address: str
    """HOST:PORT; https://HOST:PORT, where TLS is spoken."""
    token: str | None
    """The environment variable that holds the server's token."""
    ca: str | None = None
    """The environment variable that holds the path of the certificates that are trusted."""
    described_by: tuple[Path, ...] = ()
    """The project's files that declare its types."""

    @property
    def title(self) -> str:
        version = f" {self.version}" if self.version else ""
        return f"{self.name}{version} @ {self.address}"

    @property
    def reference(self) -> dict[str, str | None]:
        return {"model": self.name, "version": self.version, "at": self.address}

    @property
    def files(self) -> frozenset[Path]:
        return frozenset(self.described_by)
