"""A workflow's YAML file: its name and version, its nodes, and what it answers with."""

from __future__ import annotations

import keyword
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from torchserve_dag.runtime.data.plain import WrongFieldError
from torchserve_dag.runtime.project.handler_file import Serve, check_identity

RESERVED = ("request", "item", "parameters", "len")
_ADDRESS = re.compile(r"[^\s:/]+:[0-9]{1,5}\Z")
_NOTHING: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class ServedFile:
    """A model of a TorchServe, here or on another host, which is called over gRPC."""

    model: str
    """NAME, or NAME/VERSION."""
    at: str = "127.0.0.1:7070"
    """Its gRPC address, HOST:PORT."""
    takes: str | None = None
    """The type of what it takes. A handler or workflow of this project's that is called `model` says it by itself."""
    gives: str | None = None
    token: str | None = None
    """The environment variable that holds the server's inference token; a server here has it in key_file.json."""

    def __post_init__(self) -> None:
        if not _ADDRESS.match(self.at):
            raise WrongFieldError(f'"{self.at}" is not an address; write HOST:PORT, like 127.0.0.1:7070', "at")


@dataclass(frozen=True, slots=True)
class TorchServeFile:
    """A finished `.mar` of TorchServe's, run in this process with its own handler, unedited."""

    archive: str
    """A file in `model_store/`, or a path from the project's root."""
    takes: str | None = None
    """The type of what it takes; anything, unless it is said."""
    gives: str | None = None


@dataclass(frozen=True, slots=True)
class CodeFile:
    """What runs a node's items: exactly one of the first five."""

    handler: str | None = None
    """A handler of the project: NAME, or NAME/VERSION."""
    function: str | None = None
    """A function in the Python file beside the workflow."""
    workflow: str | None = None
    """A workflow of the project, as one step of this one: NAME, or NAME/VERSION."""
    served: ServedFile | None = None
    torchserve: TorchServeFile | None = None
    batch: int | None = None
    """The most items that go through at a time; the handler's own `run.batch` unless it is given."""
    device: str | None = None
    """`auto`, `cpu` or `cuda:N`; the handler's own `run.device` unless it is given."""

    def __post_init__(self) -> None:
        _check_code(self)


@dataclass(frozen=True, slots=True)
class BranchFile(CodeFile):
    """One branch of a switch: the first whose `when` is true runs."""

    when: str | None = None
    """Only the last branch has none: it runs where no other did."""


@dataclass(frozen=True, slots=True)
class OtherwiseFile:
    """What stands in for an item that failed: a value, or the answer of other code that takes the same."""

    default: Any = field(default_factory=lambda: _NOTHING)
    fallback: CodeFile | None = None

    def __post_init__(self) -> None:
        if self.has_default == (self.fallback is not None):
            raise ValueError("write either a default or a fallback")

    @property
    def has_default(self) -> bool:
        return self.default is not _NOTHING


@dataclass(frozen=True, slots=True)
class NodeFile(CodeFile):
    """One node: what runs, what it reads, when, and what becomes of a failure."""

    switch: list[BranchFile] | None = None
    """Instead of one thing to run: several, of which each item takes one."""
    each: str | dict[str, str] | None = None
    """A list: the node runs once for each `item` of it, and its result is the list of answers, in order.
    Several lists, each named, are loops inside each other: `{page: scan.pages, line: page.lines}`."""
    input: str | None = None
    """What it takes; without it, `item` (or the innermost name) where there is an `each`, else `request`."""
    inputs: dict[str, str] = field(default_factory=dict)
    """For a function of several parameters: each one's value."""
    when: str | None = None
    """Where this is false, the item or the node is skipped."""
    timeout_s: float | None = None
    """The longest that one try of an item may take, its wait in the queue included."""
    retry: int = 0
    """How often an item is tried again after a failure that may pass: never after what its sender must mend."""
    on_error: Literal["fail", "skip"] | OtherwiseFile = "fail"
    """What a failed item does: fail its request, be skipped, or be stood in for."""

    def __post_init__(self) -> None:
        if self.switch is None:
            _check_code(self)
        else:
            _check_switch(self, self.switch)
        if self.input is not None and self.inputs:
            raise ValueError("a node has input or inputs, not both")
        if self.each == {}:
            raise WrongFieldError("there is no list in it", "each")
        if isinstance(self.each, dict):
            for name in self.each:
                check_name("an item", name, "each")
        if self.timeout_s is not None and not 0 < self.timeout_s < math.inf:
            raise WrongFieldError("timeout_s is a number of seconds, more than 0", "timeout_s")
        if not 0 <= self.retry <= MAX_RETRIES:
            raise WrongFieldError(f"retry is 0 to {MAX_RETRIES}", "retry")

    @property
    def levels(self) -> dict[str, str]:
        """The loops of `each`, outermost first: each item's name, and the list it comes from."""
        if self.each is None:
            return {}
        return {"item": self.each} if isinstance(self.each, str) else self.each


MAX_RETRIES = 10


@dataclass(frozen=True, slots=True)
class WorkflowFile:
    """What `workflows/NAME.yaml` says."""

    name: str
    version: str
    does: str
    """What it is for, in a sentence or two."""
    nodes: dict[str, NodeFile]
    output: str | dict[str, str]
    """What it answers with: a node, or a part of its result; or several, each under a name of its own."""
    code: str = ""
    """The Python file with its functions; NAME.py unless it says otherwise."""
    serve: Serve = field(default_factory=Serve)

    def __post_init__(self) -> None:
        check_identity(self.name, self.version, self.code)
        if not self.does.strip():
            raise WrongFieldError('"does" is empty; say what the workflow is for', "does")
        if not self.nodes:
            raise WrongFieldError("there are no nodes", "nodes")
        if not self.output:
            raise WrongFieldError("it names nothing", "output")
        for name in self.nodes:
            if name == "item":
                raise WrongFieldError('a node cannot be called "item", which has a meaning of its own', "nodes", name)
            check_name("a node", name, "nodes")

    @property
    def code_file(self) -> str:
        return self.code or f"{self.name}.py"


def check_name(what: str, name: str, *path: str) -> None:
    """Raises WrongFieldError for what an expression could not read."""
    if (name in RESERVED and name != "item") or keyword.iskeyword(name) or not name.isidentifier():
        wrong = (
            f'{what} cannot be called "{name}"; write letters, digits and underscores, but not '
            f"{', '.join(RESERVED)}, which have a meaning of their own, nor a word of Python's"
        )
        raise WrongFieldError(wrong, *path, name)


_KINDS = ("handler", "function", "workflow", "served", "torchserve")


def _check_code(code: CodeFile) -> None:
    if sum(getattr(code, kind) is not None for kind in _KINDS) != 1:
        raise ValueError(f"it has exactly one of {', '.join(_KINDS)}")
    if code.function is not None and (code.batch is not None or code.device is not None):
        raise ValueError("batch and device are for models; a function takes one item at a time")
    if code.device is not None and code.handler is None:
        raise ValueError("device is for handlers")
    if code.batch is not None and code.batch < 1:
        raise WrongFieldError("batch is at least 1", "batch")


def _check_switch(node: NodeFile, branches: list[BranchFile]) -> None:
    if any(getattr(node, kind) is not None for kind in (*_KINDS, "batch", "device")):
        raise ValueError("a switch's branches say what runs, with its batch and device; the node itself does not")
    if len(branches) < 2:  # noqa: PLR2004
        raise WrongFieldError("a switch has two branches or more", "switch")
    for i, branch in enumerate(branches[:-1]):
        if branch.when is None:
            raise WrongFieldError("only the last branch may be without a when", "switch", i)
