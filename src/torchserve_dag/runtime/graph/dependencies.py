"""The second step of a check: which nodes each node reads, the order that follows, and what nothing reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.graph.drafts import Draft
from torchserve_dag.runtime.graph.expression import ExpressionError, names_in
from torchserve_dag.runtime.graph.graph import PARAMETERS, REQUEST
from torchserve_dag.runtime.graph.problems import Place, Problems
from torchserve_dag.runtime.graph.signature import ONE
from torchserve_dag.runtime.graph.upstream import upstream
from torchserve_dag.runtime.project.workflow_file import WorkflowFile


def expressions(draft: Draft) -> Iterator[tuple[Place, str, int]]:
    """Each expression of a node: its place in the file, its text, and how many of the node's loops enclose it."""
    file = draft.file
    for i, (level, text) in enumerate(file.levels.items()):
        yield draft.level_place(level), text, i
    depth = len(file.levels)
    if file.when is not None:
        yield (draft.name, "when"), file.when, depth
    for code in draft.all:
        if code.when is not None:
            yield (*code.place, "when"), code.when, depth
        for parameter, text in code.inputs.items():
            yield draft.input_place(parameter), text, depth


def needs(draft: Draft, file: WorkflowFile, problems: Problems) -> frozenset[str]:
    """The names that a node's expressions read: nodes, and the request."""
    levels = list(draft.file.levels)
    names: set[str] = set()
    for place, text, around in expressions(draft):
        names |= _needs_of(place, text, levels[:around], levels, file, problems)
    return frozenset(names)


def _needs_of(
    place: Place, text: str, around: list[str], levels: list[str], file: WorkflowFile, problems: Problems
) -> set[str]:
    """What one expression reads; `around`: the elements of the loops that are around it, of all `levels`."""
    known = {*file.nodes, REQUEST, PARAMETERS, *around}
    try:
        names = names_in(text)
    except ExpressionError as error:
        problems.add(place, error.what, error.help)
        return set()
    for unknown in sorted(names - known):
        if unknown == ONE or unknown in levels:
            what = f'"{text}" reads {unknown}, and there is no {unknown} here'
            problems.add_once(place, what, "a node with each has one")
        else:
            hint = plain.did_you_mean(unknown, sorted(known))
            problems.add_once(place, f'there is no node "{unknown}"', hint)
    return set(names & {*file.nodes, REQUEST} - {*around})


def order(drafts: Mapping[str, Draft], problems: Problems) -> list[str]:
    """The nodes in an order in which each comes after all that it reads."""
    graph = {name: sorted(draft.needs) for name, draft in drafts.items()}
    try:
        names = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = error.args[1]
        problems.add((circle[0],), f"these nodes wait for each other: {' -> '.join(reversed(circle))}")
        return []
    return [name for name in names if name != REQUEST]


def refuse_unread(
    drafts: Mapping[str, Draft], output_reads: frozenset[str], file: WorkflowFile, problems: Problems
) -> None:
    """Adds a problem for each node that the output does not depend on, and where no node reads the request."""
    needed = {name: draft.needs for name, draft in drafts.items()}
    used = upstream(output_reads, needed, {name: draft.file.stops for name, draft in drafts.items()})
    shown = file.output if isinstance(file.output, str) else ", ".join(file.output.values())
    for name in file.nodes:
        if name not in used:
            what = f'nothing reads it on the way to the output, "{shown}"'
            problems.add((name,), what, "read it, or remove it")
    if not len(problems) and not any(REQUEST in draft.needs for draft in drafts.values()):
        problems.add_at(("nodes",), "no node reads the request", "begin with input: request")
