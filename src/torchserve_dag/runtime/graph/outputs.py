"""A workflow's output: the nodes that it reads, and its compiled expressions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.graph.expression import ExpressionError, compile_expression, names_in
from torchserve_dag.runtime.graph.graph import PARAMETERS, REQUEST, Output
from torchserve_dag.runtime.graph.problems import Place, Problems
from torchserve_dag.runtime.project.workflow_file import WorkflowFile


def reads(file: WorkflowFile, problems: Problems) -> frozenset[str]:
    """The names that the output's expressions read."""
    read: set[str] = set()
    for name, text in _texts(file).items():
        place = _place(name)
        try:
            names = names_in(text)
        except ExpressionError as error:
            problems.add_at(place, f"output: {error.what}", error.help)
            continue
        for unknown in sorted(names - {*file.nodes, REQUEST, PARAMETERS}):
            hint = plain.did_you_mean(unknown, list(file.nodes))
            problems.add_at(place, f'output: there is no node "{unknown}"', hint)
        read |= names
    return frozenset(read)


def compiled(file: WorkflowFile, scope: Mapping[str, Any], problems: Problems) -> Output:
    """Compile the output over `scope`: name → type of each node's result, and of the request."""
    values = {}
    for name, text in _texts(file).items():
        try:
            values[name] = compile_expression(text, scope)
        except ExpressionError as error:
            problems.add_at(_place(name), f"output: {error.what}", error.help)
    return Output(values)


def _texts(file: WorkflowFile) -> Mapping[str, str]:
    return {"": file.output} if isinstance(file.output, str) else file.output


def _place(name: str) -> Place:
    return ("output", name) if name else ("output",)
