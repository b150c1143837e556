"""A node's policy for items that fail, from its file."""

from __future__ import annotations

from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.graph.graph import Code, Policy
from torchserve_dag.runtime.graph.problems import Problems
from torchserve_dag.runtime.project.workflow_file import NodeFile, OtherwiseFile


def policy_of(name: str, file: NodeFile, gives: Any, fallback: Code | None, problems: Problems) -> Policy:
    """The policy of a node whose answers have the type `gives`; a default of another type is a problem."""
    if not isinstance(file.on_error, OtherwiseFile):
        return Policy(file.timeout_s, file.retry, file.on_error)
    if fallback:
        return Policy(file.timeout_s, file.retry, "fallback", fallback=fallback)
    default = None
    try:
        default = plain.build(gives, file.on_error.default)
    except plain.WrongDataError as error:
        for wrong in error.wrongs:
            place = (name, "on_error", "default", *wrong.path)
            problems.add(place, f"the default is not {plain.name_of(gives)}: {wrong.what}", wrong.help)
    return Policy(file.timeout_s, file.retry, "default", default)
