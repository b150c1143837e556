"""A workflow's YAML file: its name and version, its nodes, and which of them answers."""

from __future__ import annotations

import keyword
from dataclasses import dataclass, field

from torchserve_dag.handler_file import Serve, check_identity
from torchserve_dag.plain import WrongFieldError

RESERVED = ("request", "item", "parameters", "len")


@dataclass(frozen=True, slots=True)
class NodeFile:
    """One node: a handler or a function, what it reads, and when it runs."""

    handler: str | None = None
    """A handler of the project: NAME, or NAME/VERSION."""
    function: str | None = None
    """A function in the Python file beside the workflow."""
    each: str | None = None
    """A list: the node runs once for each `item` of it, and its result is the list of answers, in order."""
    input: str | None = None
    """What it takes; without it, `item` where there is an `each`, else `request`."""
    inputs: dict[str, str] = field(default_factory=dict)
    """For a function of several parameters: each one's value."""
    when: str | None = None
    """Where this is false, the item or the node is skipped."""
    batch: int | None = None
    """The most items that go through at a time; the handler's own `run.batch` unless it is given."""
    device: str | None = None
    """`auto`, `cpu` or `cuda:N`; the handler's own `run.device` unless it is given."""

    def __post_init__(self) -> None:
        if (self.handler is None) == (self.function is None):
            raise ValueError("a node has either a handler or a function")
        if self.input is not None and self.inputs:
            raise ValueError("a node has input or inputs, not both")
        if self.handler is not None and self.inputs:
            raise ValueError("a handler takes one input; write input")
        if self.function is not None and (self.batch is not None or self.device is not None):
            raise ValueError("batch and device are for handlers; a function takes one item at a time")
        if self.batch is not None and self.batch < 1:
            raise ValueError("batch is at least 1")


@dataclass(frozen=True, slots=True)
class WorkflowFile:
    """What `workflows/NAME.yaml` says."""

    name: str
    version: str
    does: str
    """What it is for, in a sentence or two."""
    nodes: dict[str, NodeFile]
    output: str
    """The node whose result is the answer."""
    code: str = ""
    """The Python file with its functions; NAME.py unless it says otherwise."""
    serve: Serve = field(default_factory=Serve)

    def __post_init__(self) -> None:
        check_identity(self.name, self.version, self.code)
        if not self.does.strip():
            raise WrongFieldError('"does" is empty; say what the workflow is for', "does")
        if not self.nodes:
            raise WrongFieldError("there are no nodes", "nodes")
        for name in self.nodes:
            if name in RESERVED or keyword.iskeyword(name) or not name.isidentifier():
                what = (
                    f'a node cannot be called "{name}"; write letters, digits and underscores, but not '
                    f"{', '.join(RESERVED)}, which have a meaning of their own, nor a word of Python's"
                )
                raise WrongFieldError(what, "nodes", name)

    @property
    def code_file(self) -> str:
        return self.code or f"{self.name}.py"
