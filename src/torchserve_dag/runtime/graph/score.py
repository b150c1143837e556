"""Whether the answers of a workflow have the number that its `serve: {score: FIELD}` names."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.source import CheckError, Problem
from torchserve_dag.runtime.graph.graph import Graph


def check_score(graph: Graph) -> Graph:
    """Returns the same graph. Raises CheckError if its answers lack the number that `serve.score` names."""
    path = graph.serve.score
    if path is None:
        return graph
    kind = graph.answer
    for name in path.split("."):
        if kind is Any or plain.name_of(kind).startswith("dict"):
            return graph
        fields = plain.field_types(kind) if is_dataclass(kind) and isinstance(kind, type) else {}
        if name not in fields:
            what = f'serve: score: {plain.name_of(kind)} has no field "{name}"'
            raise CheckError([_problem(graph, what, plain.did_you_mean(name, list(fields)))])
        kind = fields[name]
    if kind not in {int, float, Any}:
        what = f'serve: score: "{path}" is {plain.name_of(kind)}, not a number'
        raise CheckError([_problem(graph, what, "name a field that holds one number")])
    return graph


def _problem(graph: Graph, what: str, help_: str) -> Problem:
    line = next((i for i, text in enumerate(graph.path.read_text("utf-8").splitlines(), 1) if "score:" in text), 1)
    return Problem(str(graph.path), line, what, help_)
