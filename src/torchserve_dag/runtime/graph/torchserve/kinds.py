"""The kinds of code that are TorchServe handlers: they get rows and a context, and run unedited, each in a process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.runtime.graph.kinds import Kind


@dataclass(frozen=True, slots=True)
class ArchiveCode(Kind):
    """The handler of a model archive."""

    key = "torchserve"
    noun = "an archive of TorchServe's"
    drawn_as = "model"
    elsewhere = True
    one_at_a_time = True

    archive: Path
    """A `.mar`, or a folder with what is in one."""

    @property
    def title(self) -> str:
        return self.archive.name


@dataclass(frozen=True, slots=True)
class RowsFunctionCode(Kind):
    """A function of a TorchServe workflow."""

    key = "function"
    noun = "a function of TorchServe's"
    drawn_as = "model"
    elsewhere = True
    one_at_a_time = True

    file: Path
    """The workflow's Python file."""
    function: str

    @property
    def title(self) -> str:
        return self.function
