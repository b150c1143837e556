"""A checked workflow: its nodes with their types, in an order in which they can run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torchserve_dag.runtime.data.source import Source
from torchserve_dag.runtime.graph.expression import Expression
from torchserve_dag.runtime.project.handler_file import HandlerFile, Serve

REQUEST = "request"
"""The name of what the client sent, decoded: the graph's one start."""


@dataclass(frozen=True, slots=True)
class RowsCode:
    """A TorchServe handler: that of a model's archive, or a function of rows and a context."""

    file: Path
    """The archive, or a folder with what is in one; or the function's Python file."""
    function: str | None = None

    @property
    def archive(self) -> Path | None:
        return None if self.function else self.file


@dataclass(frozen=True, slots=True)
class Served:
    """A model of another TorchServe, called over gRPC."""

    name: str
    version: str | None
    address: str
    """HOST:PORT."""
    gives: Any
    """The message to make of its answer's body; where it is Any, its JSON's data, or its bytes."""
    token: str | None
    """The environment variable that holds the server's token."""
    described_by: tuple[Path, ...] = ()
    """The project's files that say its types."""


@dataclass(frozen=True, slots=True)
class Code:
    """What runs items, one of the five kinds, and what it takes of each."""

    name: str
    """The node's own; `NODE.BRANCH` in a switch, and `NODE.fallback`. Metrics and spans carry it."""
    takes: Mapping[str, Expression]
    """Each parameter's value."""
    sees_skipped: frozenset[str]
    """The parameters that take a Skipped; any other skipped input skips the item."""
    gives: Any
    """The type of its answer for one item; of one piece of it where it yields."""
    handler: Source[HandlerFile] | None = None
    function: Callable[..., Any] | None = None
    """It is called with the node's values by name."""
    rows: RowsCode | None = None
    """A TorchServe handler, in this process."""
    served: Served | None = None
    graph: Graph | None = None
    """A workflow as a step of another."""
    batch: int = 1
    """Items that one call takes; of what runs elsewhere, how many may be under way at a time."""
    device: str | None = None
    yields: bool = False
    """Whether its answer comes in pieces."""

    @property
    def takes_by_name(self) -> bool:
        """Whether it is called with several values by their names, and not with one."""
        return self.function is not None or self.takes.keys() != {"item"}


@dataclass(frozen=True, slots=True)
class Branch:
    when: Expression | None
    """None: always."""
    code: Code


@dataclass(frozen=True, slots=True)
class Policy:
    """What becomes of an item that fails."""

    timeout_s: float | None = None
    """Of each try, the wait in the queue included."""
    retries: int = 0
    on_error: Literal["fail", "skip", "default", "fallback"] = "fail"
    default: Any = None
    fallback: Code | None = None


@dataclass(frozen=True, slots=True)
class Level:
    """One loop of an `each`: what an element is called, and the list."""

    name: str
    list: Expression


@dataclass(frozen=True)
class Node:
    name: str
    branches: tuple[Branch, ...]
    """What runs; an item takes the first whose `when` is true, and is skipped where none is."""
    each: tuple[Level, ...]
    """Outermost first; empty for a node that runs once."""
    when: Expression | None
    result: Any
    """The type of the node's result; a list for each level of `each`, and for what it yields."""
    needs: frozenset[str]
    """The nodes (and `request`) that must have ended before this one can start."""
    depth: int
    """How many nodes lie on the longest way from the request to here."""
    policy: Policy = Policy()
    follows: str | None = None
    """The yielding node whose pieces are this one's items, each as it comes."""

    @property
    def codes(self) -> list[Code]:
        """Everything that it may run."""
        fallback = [self.policy.fallback] if self.policy.fallback else []
        return [branch.code for branch in self.branches] + fallback

    @property
    def code(self) -> Code:
        """What it runs, or the first branch of its switch."""
        return self.branches[0].code

    @functools.cached_property
    def streams(self) -> bool:
        """Whether its result comes in pieces."""
        return self.follows is not None or any(code.yields for code in self.codes)


@dataclass(frozen=True, slots=True)
class Output:
    """What a workflow answers with: one value, or several under their names."""

    values: Mapping[str, Expression]
    """`{"": expression}` for one value without a name."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(name for value in self.values.values() for name in value.names) - {"parameters"}

    @property
    def type(self) -> Any:
        return self.values[""].type if "" in self.values else dict[str, Any]


def result_of(node: Node) -> Expression:
    """The expression that is a node's result."""
    name = node.name
    return Expression(name, node.result, frozenset({name}), lambda values: values[name])


@dataclass(frozen=True)
class Graph:
    name: str
    version: str
    does: str
    path: Path
    functions_path: Path | None
    request: Any
    """The type of what the client sends."""
    nodes: Mapping[str, Node]
    """In an order in which each comes after those it needs."""
    output: Output
    serve: Serve

    @property
    def answer(self) -> Any:
        """The type of what the client gets."""
        return self.output.type

    @property
    def codes(self) -> dict[str, Code]:
        """Everything that the nodes run, by its name; what a workflow inside runs is called `NODE/NAME`."""
        found: dict[str, Code] = {}
        for node in self.nodes.values():
            for code in node.codes:
                found[code.name] = code
                if code.graph:
                    found |= {f"{code.name}/{name}": inner for name, inner in code.graph.codes.items()}
        return found

    @property
    def handlers(self) -> dict[str, Source[HandlerFile]]:
        """The handler files that run, by the name of their code."""
        return {name: code.handler for name, code in self.codes.items() if code.handler}

    @property
    def graphs(self) -> list[Graph]:
        """This one, and those of the workflows inside."""
        inner = [code.graph for node in self.nodes.values() for code in node.codes if code.graph]
        return [self, *(graph for one in inner for graph in one.graphs)]

    @property
    def files(self) -> set[Path]:
        """The files of the project that it is made of: workflows and handlers, and the code of both."""
        found = {self.path, *([self.functions_path] if self.functions_path else [])}
        for code in self.codes.values():
            if code.handler:
                found |= {code.handler.path, code.handler.path.parent / code.handler.value.code_file}
            if code.served:
                found |= {*code.served.described_by}
            if code.graph:
                found |= code.graph.files
        return found

    @property
    def streaming(self) -> str | None:
        """The node whose pieces are the answer's pieces, where it comes in pieces."""
        value = self.output.values.get("")
        name = value.text.strip() if value else ""
        return name if name in self.nodes and self.nodes[name].streams else None

    @property
    def streams(self) -> bool:
        """Whether the answer comes in pieces."""
        return self.streaming is not None

    def segment(self, output: Output, known: frozenset[str]) -> Graph:
        """The part of the graph that gives `output` where the results of the nodes `known` come with the request."""
        used: set[str] = set()
        todo = list(output.needs)
        while todo:
            name = todo.pop()
            if name not in used | known | {REQUEST}:
                used.add(name)
                todo += self.nodes[name].needs
        nodes = {
            name: replace(node, needs=(node.needs - known) or frozenset({REQUEST}))
            for name, node in self.nodes.items()
            if name in used
        }
        return replace(self, nodes=nodes, output=output)
