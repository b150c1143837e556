"""The part of a graph that one kind of request runs, and the order in which its nodes can start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.options import OUTPUTS
from torchserve_dag.runtime.engine.queue import ItemT
from torchserve_dag.runtime.engine.station import Station
from torchserve_dag.runtime.graph.graph import REQUEST, Graph, Node, Output, result_of, used_by
from torchserve_dag.runtime.messages import InputError

ANSWER = ""
"""Stands for the answer among the names of nodes: it is ready when everything that the output reads has ended."""

MAX_PLANS = 256
"""How many plans are cached; there is one for each set of outputs that clients request."""


@dataclass(frozen=True)
class Plan(Generic[ItemT]):
    graph: Graph
    output: Output
    nodes: Mapping[str, Node]
    """The nodes that the output needs."""
    stations: Mapping[str, Station[ItemT]]
    """Code name → its station."""
    waits: Mapping[str, int]
    """Node → how many nodes must end before it starts; a streaming node that it follows does not count."""
    after: Mapping[str, Sequence[str]]
    """Node → the nodes that wait for it."""
    followers: Mapping[str, Sequence[Node]]
    """Streaming node → the nodes that run on its chunks as these arrive."""
    readers: Mapping[str, Sequence[str]]
    """Streaming node → the nodes with a function that takes its chunks when it wants them."""
    streaming: str | None
    """The node whose chunks the answer consists of, where the answer streams."""
    way: Sequence[str]
    """The nodes that a chunk passes on its way to the client, from the node that yields to `streaming`; none where
    another node reads one of them, too, so that its chunks are kept."""
    prefix: str = ""
    """Prefix of the names of a sub-workflow's codes, like `sub/`; empty for the workflow itself."""


def make_plan(graph: Graph, output: Output, stations: Mapping[str, Station[ItemT]], prefix: str = "") -> Plan[ItemT]:
    """The plan of requests that want `output`."""
    used = used_by(output, graph.nodes)
    nodes = {name: node for name, node in graph.nodes.items() if name in used}
    needs = {name: node.waits_for for name, node in nodes.items()}
    needs = {name: some or frozenset({REQUEST}) for name, some in needs.items()}
    needs[ANSWER] = frozenset(used & output.needs) or frozenset({REQUEST})
    after: dict[str, list[str]] = {}
    for name, some in needs.items():
        for need in some:
            after.setdefault(need, []).append(name)
    followers: dict[str, list[Node]] = {}
    readers: dict[str, list[str]] = {}
    for node in nodes.values():
        if node.follows:
            followers.setdefault(node.follows, []).append(node)
        for name in node.feeds:
            readers.setdefault(name, []).append(node.name)
    streaming = graph.streaming if output is graph.output else None
    return Plan(
        graph,
        output,
        nodes,
        stations,
        {name: len(some) for name, some in needs.items()},
        after,
        followers,
        readers,
        streaming,
        _way(streaming, nodes) if streaming else (),
        prefix,
    )


def _way(streaming: str, nodes: Mapping[str, Node]) -> tuple[str, ...]:
    way = [streaming]
    while before := nodes[way[0]].follows:
        way.insert(0, before)
    after = dict(pairwise(way))
    read_by_others = any(
        name in node.needs and (node.name != after.get(name) or name in node.waits_for)
        for name in way
        for node in nodes.values()
    )
    return () if read_by_others else tuple(way)


class Plans(Generic[ItemT]):
    """A graph's plans, by the outputs that clients ask for."""

    def __init__(self, default: Plan[ItemT]) -> None:
        """`default` is the plan for the workflow's own output."""
        self.default = default
        self._plans: dict[tuple[str, ...], Plan[ItemT]] = {(): default}

    def for_outputs(self, names: tuple[str, ...]) -> Plan[ItemT]:
        """The plan for nodes named by a client; without names, for the workflow's own output. Raises InputError."""
        plan = self._plans.get(names)
        if plan is None:
            graph = self.default.graph
            plan = make_plan(graph, _output_of(graph, names), self.default.stations)
            if len(self._plans) < MAX_PLANS:
                self._plans[names] = plan
        return plan


def _output_of(graph: Graph, names: Sequence[str]) -> Output:
    """The output that consists of the named nodes' results. Raises InputError."""
    for name in names:
        if name not in graph.nodes:
            hint = plain.did_you_mean(name[:50], list(graph.nodes))
            raise InputError(f'The header {OUTPUTS} names "{name[:50]}", and there is no such node; {hint}')
        kind = graph.nodes[name].result
        if not plain.fits_json(kind):
            raise InputError(f"The result of {name} is {plain.name_of(kind)}, which cannot be written as JSON.")
    return Output({name: result_of(graph.nodes[name]) for name in names})
