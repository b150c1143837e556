"""A workflow's YAML file: its name and version, its nodes, and what it answers with."""

from __future__ import annotations

import keyword
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from torchserve_dag.runtime.messages import WrongFieldError
from torchserve_dag.runtime.project.handler_file import Serve, check_device, check_identity

RESERVED = ("request", "item", "parameters", "len")
TLS = "https://"
_ADDRESS = re.compile(rf"({TLS})?[^\s:/]+:[0-9]{{1,5}}\Z")
_NOTHING: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class ServedFile:
    """A model that another server serves, on this machine or another, called over gRPC."""

    model: str
    """The model's name on that server: `NAME` or `NAME/VERSION`."""
    at: str = "127.0.0.1:7070"
    """The server's gRPC address: `HOST:PORT`, or `https://HOST:PORT` where it speaks TLS, as a front door does."""
    takes: str | None = None
    """The type of the model's input. Without it, the type of this project's handler or workflow of that name, else any
    type."""
    gives: str | None = None
    """The type of the model's answer. Without it, as for `takes`."""
    token: str | None = None
    """The environment variable that holds the server's inference token. Without it, the token in `key_file.json` of a
    server on this host."""
    ca: str | None = None
    """For `https://`: the environment variable that holds the path of a PEM file with the certificates to be trusted.
    Without it, those of public authorities."""

    def __post_init__(self) -> None:
        if not _ADDRESS.match(self.at):
            raise WrongFieldError(f'"{self.at}" is not an address; write HOST:PORT, like 127.0.0.1:7070', "at")
        if self.ca and not self.at.startswith(TLS):
            raise WrongFieldError(f"certificates are for TLS; write at: {TLS}{self.at}", "ca")


@dataclass(frozen=True, slots=True)
class TorchServeFile:
    """An existing TorchServe archive, whose own, unedited handler runs in a process of its own."""

    archive: str
    """A `.mar` file in `model_store/`, or its path from the project's root."""
    takes: str | None = None
    """The type of the archive's input. Without it, any type."""
    gives: str | None = None
    """The type of the archive's answer; of each chunk, if its handler streams. Without it, any type."""


@dataclass(frozen=True, slots=True)
class CodeFile:
    """What a node runs: exactly one of the first five."""

    handler: str | None = None
    """A handler of the project: `NAME` or `NAME/VERSION`."""
    function: str | None = None
    """A function of the workflow's Python file, with types for its parameters and its result."""
    workflow: str | None = None
    """Another workflow of the project: `NAME` or `NAME/VERSION`."""
    served: ServedFile | None = None
    """A model that a TorchServe serves, on this host or another."""
    torchserve: TorchServeFile | None = None
    """An existing TorchServe archive (`.mar`)."""
    batch: int | None = None
    """The largest number of items at a time. Without it: `run.batch` of a handler, 1 of an archive, 64 calls
    in progress of a served model or a workflow."""
    device: str | None = None
    """For a handler: `auto`, `cpu` or `cuda:N`. Without it, the handler's `run.device`."""

    def __post_init__(self) -> None:
        _check_code(self)


@dataclass(frozen=True, slots=True)
class BranchFile(CodeFile):
    """A branch of a `switch`. The first branch whose `when` is true runs. A branch names what runs as a node does."""

    when: str | None = None
    """The condition, an expression. Only the last branch may be without: it runs where no other branch does."""


@dataclass(frozen=True, slots=True)
class CircuitFile:
    """When a code is not tried for a while, because it has failed again and again."""

    failures: int = 5
    """So many items in a row, of whichever requests, fail with 429 or 5xx before the circuit opens."""
    open_s: float = 30.0
    """So many seconds every item fails at once. Then one is tried: if it succeeds, the circuit is closed."""

    def __post_init__(self) -> None:
        if self.failures < 1:
            raise WrongFieldError("failures is at least 1", "failures")
        if not 0 < self.open_s < math.inf:
            raise WrongFieldError("open_s is a number of seconds, more than 0", "open_s")


@dataclass(frozen=True, slots=True)
class FallbackFile(CodeFile):
    """What runs where the code before it has failed, with the same input. It names what runs as a node does."""

    after: Literal["any", "transient"] = "any"
    """After which failures it runs: any, or only those that may be over soon (429, 5xx, time-outs, an open circuit).
    With `transient` a client is told what it has to mend, which would fail here as well."""
    timeout_s: float | None = None
    """As a node's."""
    first_chunk_s: float | None = None
    """As a node's."""
    retry: int = 0
    """As a node's."""
    circuit: CircuitFile | None = None
    """As a node's."""

    def __post_init__(self) -> None:
        _check_code(self)
        _check_attempts(self)


@dataclass(frozen=True, slots=True)
class OtherwiseFile:
    """What replaces the answer of an item that failed: exactly one of the two."""

    default: Any = field(default_factory=lambda: _NOTHING)
    """A value."""
    fallback: FallbackFile | list[FallbackFile] | None = None
    """What runs instead, with the same input: written as a node's, with `handler`, `function`, … Of a list, each runs
    where the one before it has failed, too."""

    def __post_init__(self) -> None:
        if self.has_default == (self.fallback is not None):
            raise ValueError("write either a default or a fallback")
        if self.fallback == []:
            raise WrongFieldError("there is no code in it", "fallback")

    @property
    def has_default(self) -> bool:
        return self.default is not _NOTHING

    @property
    def fallbacks(self) -> list[FallbackFile]:
        if self.fallback is None:
            return []
        return self.fallback if isinstance(self.fallback, list) else [self.fallback]


@dataclass(frozen=True, slots=True)
class RepeatFile:
    """Rounds of a node: each gets the answer of the one before as its input."""

    until: str
    """The condition that ends them: an expression in which the node's name is the answer of the round."""
    most: int
    """The most rounds, 2 to 100. The answer of the last is the node's, even if the condition does not hold."""

    def __post_init__(self) -> None:
        if not 2 <= self.most <= MOST_ROUNDS:  # noqa: PLR2004
            raise WrongFieldError(f"most is 2 to {MOST_ROUNDS}", "most")


@dataclass(frozen=True, slots=True)
class NodeFile(CodeFile):
    """A node: what it runs, its input, its condition, and its policy for failures. It has exactly one of the first five
    keys, or a `switch`.
    """

    switch: list[BranchFile] | None = None
    """Branches, of which each item takes the first whose condition is true."""
    each: str | dict[str, str] | None = None
    """An expression for a list. The node runs once for each element (`item`), and its result is the list of answers in
    the same order. Several lists, each under a name, are nested loops: `{page: scan.pages, line: page.lines}`."""
    input: str | None = None
    """An expression for the node's input. Without it, the element where there is an `each`, else `request`."""
    inputs: dict[str, str] = field(default_factory=dict)
    """For a function with several parameters: an expression for each parameter."""
    when: str | None = None
    """A condition, an expression. Where it is false, the item or the node is skipped."""
    timeout_s: float | None = None
    """The longest time that one attempt of an item may take, in seconds, its time in the queue included."""
    first_chunk_s: float | None = None
    """For code that yields: the longest time until the first chunk of an attempt, in seconds, its time in the queue
    included. Until then another may stand in; an answer that has begun is not cut off by it."""
    retry: int = 0
    """How often a failed item is tried again, at most 10. Failures that the sender must mend (4xx) are not retried."""
    circuit: CircuitFile | None = None
    """When it is not tried for a while, because it has failed again and again: `{failures: 5, open_s: 30}`."""
    repeat: RepeatFile | None = None
    """Run it again with its own answer, until a condition holds: `{until: NODE.done, most: 3}`. All rounds together
    have the request's time limit."""
    stops: dict[str, str] = field(default_factory=dict)
    """Other nodes that this one ends early: for each a condition, an expression in which this node's name is its
    answer, or one of its answers where it has an `each` or yields: `{write: verdict.flagged}`."""
    on_error: Literal["fail", "skip"] | OtherwiseFile = "fail"
    """What a failed item does: `fail` fails its request, `skip` skips the item, `{default: VALUE}` or `{fallback: …}`
    replaces its answer."""

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
        _check_attempts(self)

    @property
    def levels(self) -> dict[str, str]:
        """The loops of `each`, outermost first: each item's name, and the list it comes from."""
        if self.each is None:
            return {}
        return {"item": self.each} if isinstance(self.each, str) else self.each


MAX_RETRIES = 10
MOST_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class WorkflowFile:
    """What `workflows/NAME.yaml` says."""

    name: str
    """The model's name on the server: lower-case letters, digits and underscores, a letter first."""
    version: str
    """Numbers with dots, in quotes: `"1.0"`."""
    does: str
    """What the workflow is for, in a sentence or two."""
    nodes: dict[str, NodeFile]
    """The nodes, by name."""
    output: str | dict[str, str]
    """The answer: an expression for a node or a part of its result; or several expressions, each under a name."""
    code: str = ""
    """The Python file in `workflows/` that holds the functions. Without it, `NAME.py`."""
    requirements: list[str] = field(default_factory=list)
    """The installed packages that the functions import, with their versions, as for pip: `rapidfuzz>=3,<4`. `check`,
    `build` and every worker refuse others; `build.json` names the versions that were there."""
    serve: Serve = field(default_factory=Serve)
    """How TorchServe serves the workflow."""

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
    """Raises WrongFieldError for a name that expressions cannot use."""
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
    if code.device is not None:
        check_device(code.device)
    if code.batch is not None and code.batch < 1:
        raise WrongFieldError("batch is at least 1", "batch")


def _check_attempts(file: NodeFile | FallbackFile) -> None:
    for name in ("timeout_s", "first_chunk_s"):
        limit = getattr(file, name)
        if limit is not None and not 0 < limit < math.inf:
            raise WrongFieldError(f"{name} is a number of seconds, more than 0", name)
    if not 0 <= file.retry <= MAX_RETRIES:
        raise WrongFieldError(f"retry is 0 to {MAX_RETRIES}", "retry")


def _check_switch(node: NodeFile, branches: list[BranchFile]) -> None:
    if any(getattr(node, kind) is not None for kind in (*_KINDS, "batch", "device")):
        raise ValueError("a switch's branches say what runs, with its batch and device; the node itself does not")
    if len(branches) < 2:  # noqa: PLR2004
        raise WrongFieldError("a switch has two branches or more", "switch")
    for i, branch in enumerate(branches[:-1]):
        if branch.when is None:
            raise WrongFieldError("only the last branch may be without a when", "switch", i)
