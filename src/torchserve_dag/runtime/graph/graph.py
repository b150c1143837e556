"""A checked workflow: its nodes with their types, in an order in which they can run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torchserve_dag.runtime.data.source import Source
from torchserve_dag.runtime.graph.expression import Expression
from torchserve_dag.runtime.graph.kinds import HandlerCode, Kind
from torchserve_dag.runtime.graph.upstream import upstream
from torchserve_dag.runtime.project.handler_file import HandlerFile, Serve

REQUEST = "request"
"""The name of the decoded request, from which the graph starts."""
PARAMETERS = "parameters"
"""The name of the request's parameters in expressions."""


@dataclass(frozen=True, slots=True)
class Circuit:
    """When a code is not tried for a while."""

    failures: int
    """So many items in a row fail before it opens."""
    open_s: float


@dataclass(frozen=True, slots=True)
class Attempts:
    """How often an item is tried, and for how long."""

    timeout_s: float | None = None
    """The time limit of each attempt, its wait in the queue included."""
    retries: int = 0
    circuit: Circuit | None = None
    first_chunk_s: float | None = None
    """The time limit of each attempt until its first chunk."""
    after: Literal["any", "transient"] = "any"
    """Of a fallback: after which failures of the code before it."""


@dataclass(frozen=True, slots=True)
class Code:
    """What runs the items of a node, and its input for each."""

    name: str
    """The node's name; `NODE.BRANCH` in a switch; `NODE.fallback`, or `NODE.fallback_1` of several. Metrics and spans
    carry this name."""
    takes: Mapping[str, Expression]
    """The expression for each parameter."""
    sees_skipped: frozenset[str]
    """The parameters that accept a Skipped; any other skipped input skips the item."""
    gives: Any
    """The type of its answer for one item, or of one chunk if it streams."""
    kind: Kind
    batch: int = 1
    """The largest batch; for code that runs elsewhere, the limit of items in flight."""
    yields: bool = False
    """Whether its answer comes in chunks."""
    attempts: Attempts = Attempts()
    feeds: Mapping[str, str] = field(default_factory=dict)
    """For each parameter that takes chunks as they come: the node whose chunks they are."""

    @property
    def inner(self) -> Graph | None:
        """The graph of the sub-workflow that this code runs, if it runs one."""
        return self.kind.graph if isinstance(self.kind, WorkflowCode) else None


@dataclass(frozen=True, slots=True)
class Branch:
    when: Expression | None
    """The condition; None for a branch that always runs."""
    code: Code


@dataclass(frozen=True, slots=True)
class Policy:
    """What happens to an item whose attempts have failed."""

    on_error: Literal["fail", "skip", "default", "fallback"] = "fail"
    default: Any = None
    fallbacks: tuple[Code, ...] = ()
    """Each runs where the code before it has failed."""


@dataclass(frozen=True, slots=True)
class Repeat:
    """Rounds of a node, each with the answer of the one before."""

    until: Expression
    most: int


@dataclass(frozen=True, slots=True)
class Level:
    """A loop of an `each`: the name of an element, and the list."""

    name: str
    list: Expression


@dataclass(frozen=True)
class Node:
    name: str
    branches: tuple[Branch, ...]
    """An item runs the first branch whose `when` is true, and is skipped if there is none."""
    each: tuple[Level, ...]
    """The loops, outermost first; empty for a node that runs once."""
    when: Expression | None
    result: Any
    """The type of the node's result: a list for each loop of `each`; if the node streams, the list of its chunks."""
    needs: frozenset[str]
    """The nodes (and `request`) that it reads."""
    depth: int
    """The number of nodes on the longest path from the request to this node."""
    policy: Policy = Policy()
    follows: str | None = None
    """The streaming node whose chunks are this node's items, each as it arrives."""
    repeat: Repeat | None = None
    stops: Mapping[str, Expression] = field(default_factory=dict)
    """The nodes that it ends early, each with the condition on one of its answers."""

    @property
    def codes(self) -> list[Code]:
        """The code of all branches, and of the fallbacks."""
        return [*(branch.code for branch in self.branches), *self.policy.fallbacks]

    @functools.cached_property
    def feeds(self) -> frozenset[str]:
        """The nodes whose chunks a function of this node takes as they come, and that nothing here reads whole."""
        whole = [value for code in self.codes for p, value in code.takes.items() if p not in code.feeds]
        whole += [when for when in (self.when, *(branch.when for branch in self.branches)) if when]
        fed = {name for code in self.codes for name in code.feeds.values()}
        return frozenset(fed.difference(*(value.names for value in whole)))

    @functools.cached_property
    def waits_for(self) -> frozenset[str]:
        """The nodes that must have ended before this node can start."""
        return self.needs - self.feeds - {self.follows}

    @functools.cached_property
    def decides(self) -> bool:
        """Whether its answers decide what else runs."""
        return self.repeat is not None or bool(self.stops)

    @property
    def code(self) -> Code:
        """The code of a node without a switch, or of the first branch of its switch."""
        return self.branches[0].code

    @functools.cached_property
    def streams(self) -> bool:
        """Whether its result comes in chunks."""
        return self.follows is not None or any(code.yields for code in self.codes)


@dataclass(frozen=True, slots=True)
class Output:
    """A workflow's answer: a single value, or several values with names."""

    values: Mapping[str, Expression]
    """`{"": expression}` for a single value without a name."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(name for value in self.values.values() for name in value.names) - {PARAMETERS}

    @property
    def type(self) -> Any:
        return self.values[""].type if "" in self.values else dict[str, Any]


def result_of(node: Node) -> Expression:
    """The expression that reads a node's result."""
    name = node.name
    return Expression(name, node.result, frozenset({name}), lambda values: values[name])


def used_by(output: Output, nodes: Mapping[str, Node]) -> set[str]:
    """The nodes that an output needs, and those that may end one of them early."""
    return upstream(
        output.needs,
        {name: node.needs for name, node in nodes.items()},
        {name: node.stops for name, node in nodes.items()},
    )


@dataclass(frozen=True)
class Graph:
    name: str
    version: str
    does: str
    path: Path
    functions_path: Path | None
    request: Any
    """The type of the decoded request."""
    nodes: Mapping[str, Node]
    """The nodes, each after all that it needs."""
    output: Output
    serve: Serve
    requirements: tuple[str, ...] = ()
    """The packages that the workflow's own file names."""
    redact: Callable[[str], str] | None = None
    """The function that `serve.keep` names."""

    @property
    def of_handler(self) -> bool:
        """Whether it is a handler, as a workflow of a single node."""
        return self.path.parent.name == "handlers"

    @property
    def answer(self) -> Any:
        """The type of the answer."""
        return self.output.type

    @property
    def codes(self) -> dict[str, Code]:
        """The code of all nodes, by its name; the code of a sub-workflow is called `NODE/NAME`."""
        codes: dict[str, Code] = {}
        for node in self.nodes.values():
            for code in node.codes:
                codes[code.name] = code
                if code.inner:
                    codes |= {f"{code.name}/{name}": inner for name, inner in code.inner.codes.items()}
        return codes

    @property
    def time_limits(self) -> dict[str, float]:
        """How long a batch may run in a process that can be ended, in seconds, by the name of its code.

        Twice the node's own limit: to load a handler again takes longer than a batch that is a little late.
        """
        limits: dict[str, float] = {}
        for node in self.nodes.values():
            for code in node.codes:
                limit = min(2 * (code.attempts.timeout_s or math.inf), float(self.serve.timeout_s))
                limits[code.name] = limit
                if code.inner:
                    inner = code.inner.time_limits
                    limits |= {f"{code.name}/{name}": min(limit, of_inner) for name, of_inner in inner.items()}
        return limits

    @property
    def handlers(self) -> dict[str, Source[HandlerFile]]:
        """The files of the handlers that run, by the name of their code."""
        return {name: code.kind.file for name, code in self.codes.items() if isinstance(code.kind, HandlerCode)}

    @property
    def graphs(self) -> list[Graph]:
        """This graph, and the graphs of its sub-workflows, at every depth."""
        inner = [code.inner for node in self.nodes.values() for code in node.codes if code.inner]
        return [self, *(graph for workflow in inner for graph in workflow.graphs)]

    @property
    def all_requirements(self) -> set[str]:
        """The packages that the files of the workflow, its sub-workflows and its handlers name."""
        own = {text for graph in self.graphs for text in graph.requirements}
        return own.union(*(file.value.requirements for file in self.handlers.values()))

    @property
    def files(self) -> set[Path]:
        """The project's files that the workflow consists of: workflows, handlers, and the code of both."""
        own = {self.path, *([self.functions_path] if self.functions_path else [])}
        return own.union(*(code.kind.files for code in self.codes.values()))

    @property
    def streaming(self) -> str | None:
        """The node whose chunks the answer consists of, if the answer comes in chunks."""
        value = self.output.values.get("")
        name = value.text.strip() if value else ""
        return name if name in self.nodes and self.nodes[name].streams else None

    @property
    def streams(self) -> bool:
        """Whether the answer comes in chunks."""
        return self.streaming is not None

    def segment(self, output: Output, known: frozenset[str]) -> Graph:
        """The part of the graph that computes `output` from the request and the results of the nodes `known`."""
        nodes = {name: node for name, node in self.nodes.items() if name not in known}
        used = used_by(output, nodes)
        nodes = {
            name: replace(node, needs=(node.needs - known) or frozenset({REQUEST}))
            for name, node in nodes.items()
            if name in used
        }
        return replace(self, nodes=nodes, output=output)


@dataclass(frozen=True, slots=True)
class WorkflowCode(Kind):
    """A workflow as a step of another."""

    key = "workflow"
    noun = "a sub-workflow"
    drawn_as = "workflow"
    elsewhere = True

    graph: Graph

    @property
    def title(self) -> str:
        return f"workflow {self.graph.name} {self.graph.version}"

    @property
    def files(self) -> frozenset[Path]:
        return frozenset(self.graph.files)
