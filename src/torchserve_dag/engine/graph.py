"""A checked workflow: its nodes with their types, in an order in which they can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchserve_dag import plain
from torchserve_dag.engine.expression import Expression
from torchserve_dag.handler_file import HandlerFile, Serve
from torchserve_dag.source import Source

REQUEST = "request"
"""The name of what the client sent, decoded: the graph's one start."""


@dataclass(frozen=True, slots=True)
class RowsCode:
    """A node of TorchServe's own workflow file: a model's archive, or a function of rows and a context."""

    archive: Path | None
    function: Callable[..., Any] | None
    retries: int
    """How often a row that failed is tried again."""


@dataclass(frozen=True)
class Node:
    name: str
    takes: Mapping[str, Expression]
    """Each parameter's value."""
    each: Expression | None
    when: Expression | None
    sees_skipped: frozenset[str]
    """The parameters that take a Skipped; any other skipped input skips the node."""
    result: Any
    """The type of the node's result; with `each`, a list."""
    needs: frozenset[str]
    """The nodes (and `request`) that must have ended before this one can start."""
    depth: int
    """How many nodes lie on the longest way from the request to here."""
    handler: Source[HandlerFile] | None = None
    function: Callable[..., Any] | None = None
    """It is called with the node's values by name."""
    rows: RowsCode | None = None
    """What the node runs in a TorchServe workflow."""
    batch: int = 1
    device: str | None = None


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
    output: str
    serve: Serve

    @property
    def answer(self) -> Any:
        """The type of what the client gets."""
        return self.nodes[self.output].result

    @property
    def handlers(self) -> dict[str, Source[HandlerFile]]:
        """The handler files that the nodes run, by node."""
        return {name: node.handler for name, node in self.nodes.items() if node.handler}

    def segment(self, output: str, known: frozenset[str]) -> Graph:
        """The part of the graph that gives `output` where the results of the nodes `known` come with the request."""
        used: set[str] = set()
        todo = [output]
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

    def mermaid(self) -> str:
        """The graph as a Mermaid flowchart: types on the edges, a double edge where items fan out."""
        lines = ["flowchart LR", "  request([request])"]
        for node in self.nodes.values():
            lines.append(f'  {node.name}["{_title(node)}"]')
            for need in sorted(node.needs):
                kind = self.request if need == REQUEST else self.nodes[need].result
                fans_out = node.each is not None and need in node.each.names
                arrow = "==>" if fans_out else "-->"
                label = f"each {node.each.text}" if fans_out and node.each else plain.name_of(kind)
                lines.append(f'  {need} {arrow}|"{label}"| {node.name}')
        lines.append(f'  {self.output} -->|"{plain.name_of(self.answer)}"| answer([answer])')
        return "\n".join(lines) + "\n"


def _title(node: Node) -> str:
    if node.handler:
        model = node.handler.value
        batch = f"<br/>batch {node.batch}" if node.batch > 1 else ""
        what = f"{model.name} {model.version}{batch}"
    elif node.rows and node.rows.archive:
        what = node.rows.archive.name
    else:
        what = "function"
    when = (
        "<br/>when " + node.when.text.replace('"', "'").replace("<", "&lt;").replace(">", "&gt;") if node.when else ""
    )
    return f"<b>{node.name}</b><br/>{what}{when}"
