"""The part of a graph that one kind of request runs, and the order in which its nodes can start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.options import OUTPUTS
from torchserve_dag.runtime.engine.station import Station
from torchserve_dag.runtime.graph.graph import REQUEST, Graph, Node, Output, result_of
from torchserve_dag.runtime.graph.upstream import upstream
from torchserve_dag.runtime.messages import InputError

ANSWER = ""
"""Stands among the nodes for the answer: it is ready when all that it reads has ended."""


@dataclass(frozen=True)
class Plan:
    graph: Graph
    output: Output
    nodes: Mapping[str, Node]
    """Those that the output needs."""
    stations: Mapping[str, Station]
    """By the name of the code."""
    waits: Mapping[str, int]
    """By node: how many that it needs; a yielding node that it follows does not count."""
    after: Mapping[str, Sequence[str]]
    """By node: those that wait for it."""
    followers: Mapping[str, Sequence[Node]]
    """By yielding node: those that take its pieces as they come."""
    streaming: str | None
    """The node whose pieces are the answer's, where it streams."""
    prefix: str = ""
    """Of a workflow inside another: where it is, like `sub/`."""


def make_plan(graph: Graph, output: Output, stations: Mapping[str, Station], prefix: str = "") -> Plan:
    """The plan of requests that want `output`."""
    used = upstream(output.needs, {name: node.needs for name, node in graph.nodes.items()})
    nodes = {name: node for name, node in graph.nodes.items() if name in used}
    needs = {name: node.needs - {node.follows} for name, node in nodes.items()}
    needs = {name: some or frozenset({REQUEST}) for name, some in needs.items()}
    needs[ANSWER] = frozenset(used & output.needs) or frozenset({REQUEST})
    after: dict[str, list[str]] = {}
    for name, some in needs.items():
        for need in some:
            after.setdefault(need, []).append(name)
    followers: dict[str, list[Node]] = {}
    for node in nodes.values():
        if node.follows:
            followers.setdefault(node.follows, []).append(node)
    return Plan(
        graph,
        output,
        nodes,
        stations,
        {name: len(some) for name, some in needs.items()},
        after,
        followers,
        graph.streaming if output is graph.output else None,
        prefix,
    )


def outputs_asked(graph: Graph, names: Sequence[str]) -> Output:
    """The nodes that a request asks for, as its output. Raises InputError."""
    for name in names:
        if name not in graph.nodes:
            hint = plain.did_you_mean(name[:50], list(graph.nodes))
            raise InputError(f'The header {OUTPUTS} names "{name[:50]}", and there is no such node; {hint}')
        kind = graph.nodes[name].result
        if not plain.fits_json(kind):
            raise InputError(f"The result of {name} is {plain.name_of(kind)}, which cannot be written as JSON.")
    return Output({name: result_of(graph.nodes[name]) for name in names})
