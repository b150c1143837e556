"""What happens to items that fail, from a workflow's file: how they are tried, and what replaces their answer."""

from __future__ import annotations

from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.graph.graph import Attempts, Circuit, Code, Policy
from torchserve_dag.runtime.graph.problems import Problems
from torchserve_dag.runtime.project.workflow_file import FallbackFile, NodeFile, OtherwiseFile


def attempts_of(file: NodeFile | FallbackFile) -> Attempts:
    """How the items of a node, or of a fallback, are tried."""
    circuit = Circuit(file.circuit.failures, file.circuit.open_s) if file.circuit else None
    after = file.after if isinstance(file, FallbackFile) else "any"
    return Attempts(file.timeout_s, file.retry, circuit, file.first_chunk_s, after)


def policy_of(name: str, file: NodeFile, gives: Any, fallbacks: tuple[Code, ...], problems: Problems) -> Policy:
    """The policy of a node whose answers have the type `gives`; a default of another type is a problem."""
    if not isinstance(file.on_error, OtherwiseFile):
        return Policy(file.on_error)
    if fallbacks:
        return Policy("fallback", fallbacks=fallbacks)
    default = None
    try:
        default = plain.build(gives, file.on_error.default)
    except plain.WrongDataError as error:
        for wrong in error.wrongs:
            place = (name, "on_error", "default", *wrong.path)
            problems.add(place, f"the default is not {plain.name_of(gives)}: {wrong.what}", wrong.help)
    return Policy("default", default)
