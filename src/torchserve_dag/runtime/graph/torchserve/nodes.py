"""The graph of a TorchServe workflow: its nodes with their code and input, and its output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from torchserve_dag.runtime.compat.rows import Row
from torchserve_dag.runtime.graph.expression import Expression
from torchserve_dag.runtime.graph.graph import (
    PARAMETERS,
    REQUEST,
    Attempts,
    Branch,
    Code,
    Graph,
    Node,
    Output,
    result_of,
)
from torchserve_dag.runtime.graph.kinds import FunctionCode, Kind
from torchserve_dag.runtime.messages import Failure

_RESERVED = {"", REQUEST, PARAMETERS}
"""Names that a graph already uses."""


@dataclass(frozen=True, slots=True)
class Step:
    """A node of the `dag`: a model, or a function."""

    parents: list[str]
    kind: Kind
    batch: int
    retries: int
    timeout_s: float
    """The time limit of each attempt, as TorchServe counts it: the wait in the queue included."""


def takes_rows(graph: Graph) -> bool:
    """Whether the graph gets requests in TorchServe's form for handlers: as a Row."""
    return any(value.type is Row for node in graph.nodes.values() for value in node.code.takes.values())


def longest(steps: Mapping[str, Step]) -> float:
    """The longest time that a request may take, in seconds, if every node on the slowest path needs all attempts."""
    until: dict[str, float] = {}
    for name, step in steps.items():
        before = max((until[parent] for parent in step.parents), default=0.0)
        until[name] = before + step.timeout_s * (1 + step.retries)
    return max(until.values())


def make_nodes(steps: Mapping[str, Step]) -> tuple[dict[str, Node], Output]:
    """The nodes and the output of a graph. `steps` has each after its parents."""
    graph_names = _names_inside(steps)
    nodes: dict[str, Node] = {}
    for name, step in steps.items():
        code = Code(
            name=graph_names[name],
            takes={"item": _row_of({parent: graph_names[parent] for parent in step.parents})},
            sees_skipped=frozenset(),
            gives=bytes,
            kind=step.kind,
            batch=step.batch,
            attempts=Attempts(step.timeout_s, step.retries),
        )
        nodes[code.name] = _node(code, [graph_names[parent] for parent in step.parents], nodes)
    leaves = [name for name in steps if not any(name in step.parents for step in steps.values())]
    if len(leaves) == 1:
        return nodes, Output({"": result_of(nodes[graph_names[leaves[0]]])})
    code = Code(
        name=_free("answer", {*nodes, *_RESERVED}),
        takes={leaf: result_of(nodes[graph_names[leaf]]) for leaf in leaves},
        sees_skipped=frozenset(),
        gives=dict[str, Any],
        kind=FunctionCode(joined),
    )
    nodes[code.name] = _node(code, [graph_names[leaf] for leaf in leaves], nodes)
    return nodes, Output({"": result_of(nodes[code.name])})


def _node(code: Code, parents: list[str], nodes: Mapping[str, Node]) -> Node:
    return Node(
        name=code.name,
        branches=(Branch(None, code),),
        each=(),
        when=None,
        result=code.gives,
        needs=frozenset(parents) or frozenset({REQUEST}),
        depth=1 + max((nodes[parent].depth for parent in parents), default=0),
    )


def _names_inside(names: Mapping[str, Any]) -> dict[str, str]:
    """Each node's name in the graph: its own name, unless the graph uses that already."""
    taken = {*names, *_RESERVED}
    return {name: _free(name, taken) if name in _RESERVED else name for name in names}


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _row_of(parents: Mapping[str, str]) -> Expression:
    """The expression for a node's input: the client's request, or its parents' answers, with the client's headers.

    `parents`: the name of each in the file, and in the graph.
    """
    if not parents:
        return Expression(REQUEST, Row, frozenset({REQUEST}), _first_row)
    names = list(parents.values())
    keys = parents if len(names) > 1 else {"body": names[0]}

    def row(values: Mapping[str, Any]) -> Row:
        request = values.get(REQUEST)
        headers = request.headers if isinstance(request, Row) else {}
        headers = {key: value for key, value in headers.items() if isinstance(value, str)}  # its parts are not these
        return Row({key: values[name] for key, name in keys.items()}, headers)

    return Expression(", ".join(names), Row, frozenset(names), row)


def _first_row(values: Mapping[str, Any]) -> Row:
    request = values[REQUEST]
    if isinstance(request, Row):
        return request
    return Row({**{key: text.encode() for key, text in values[PARAMETERS].items()}, "body": request})


def joined(**answers: bytes) -> dict[str, Any] | Failure:
    """The answer of a workflow with several leaves, by their names; pictures show this name."""
    joined_answers: dict[str, Any] = {}
    for leaf, answer in answers.items():
        try:
            joined_answers[leaf] = json.loads(answer)
        except ValueError:
            joined_answers[leaf] = None
        if not isinstance(joined_answers[leaf], dict):
            message = f"{leaf} must give a JSON object, since the workflow has several leaves."
            return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, message, "HandlerError")
    return joined_answers
