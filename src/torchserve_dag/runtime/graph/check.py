"""From a workflow's file to its graph: reports every mistake that can be found before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchserve_dag.runtime.data.source import Source
from torchserve_dag.runtime.graph import dependencies, outputs
from torchserve_dag.runtime.graph.drafts import DraftReader
from torchserve_dag.runtime.graph.finder import Finder
from torchserve_dag.runtime.graph.graph import PARAMETERS, REQUEST, Graph, Node
from torchserve_dag.runtime.graph.problems import Problems
from torchserve_dag.runtime.graph.redaction import redaction
from torchserve_dag.runtime.graph.typed_nodes import NodeTyper
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.project.requirements import check_requirements
from torchserve_dag.runtime.project.workflow_file import WorkflowFile


def check(project: Project, source: Source[WorkflowFile], inner: Callable[[Path], Graph]) -> Graph:
    """The graph of a workflow's file. `inner` gives the graph of a sub-workflow from its file.

    Raises CheckError with every problem of the first step that has problems: a later step would only repeat them.
    """
    check_requirements(source)  # first: the next steps import the code
    file, problems = source.value, Problems(source)
    finder = Finder(project, file, source.path, problems, inner)

    drafts = DraftReader(file, finder, problems).read()
    problems.stop()

    for draft in drafts.values():
        draft.needs = dependencies.needs(draft, file, problems)
    output_reads = outputs.reads(file, problems)
    problems.stop()

    order = dependencies.order(drafts, problems)
    dependencies.refuse_unread(drafts, output_reads, file, problems)
    problems.stop()

    typer = NodeTyper(drafts, problems)
    request = typer.request_type()
    problems.stop()

    scope: dict[str, Any] = {REQUEST: request, PARAMETERS: dict[str, str]}
    nodes: dict[str, Node] = {}
    for name in order:
        node = typer.node(name, scope, nodes)
        if node is None:
            break
        nodes[name] = node
        scope[name] = node.result
    problems.stop()

    output = outputs.compiled(file, scope, problems)
    problems.stop()

    redact = redaction(source, finder.functions)
    return Graph(
        name=file.name,
        version=file.version,
        does=file.does,
        path=source.path,
        functions_path=finder.functions_path if finder.reads_functions else None,
        request=request,
        nodes=nodes,
        output=output,
        serve=file.serve,
        requirements=tuple(file.requirements),
        redact=redact,
    )
