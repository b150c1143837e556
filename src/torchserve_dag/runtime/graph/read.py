"""Any file of a project as a checked graph: a workflow, a workflow in TorchServe's form, or a single handler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from torchserve_dag.runtime.data import source
from torchserve_dag.runtime.graph.check import check
from torchserve_dag.runtime.graph.expression import compile_expression
from torchserve_dag.runtime.graph.finder import RunsItselfError
from torchserve_dag.runtime.graph.graph import REQUEST, Branch, Code, Graph, Node, Output, result_of
from torchserve_dag.runtime.graph.kinds import handler_code
from torchserve_dag.runtime.graph.redaction import redaction
from torchserve_dag.runtime.graph.score import check_score
from torchserve_dag.runtime.graph.torchserve.spec import check_torchserve_file, is_torchserve_file
from torchserve_dag.runtime.handler import streams, types_of
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.project.workflow_file import WorkflowFile


def read_graph(project: Project, path: Path) -> Graph:
    """The graph of a workflow's file, or of a handler's file, as a workflow of one node. Raises CheckError."""
    graph = handler_graph(project, path) if path.parent.name == "handlers" else workflow_graph(project, path)
    return check_score(graph)


def workflow_graph(project: Project, path: Path, outer: tuple[Path, ...] = ()) -> Graph:
    """The graph of a workflow's file, ours or TorchServe's. `outer`: the workflows around it. Raises CheckError."""
    if path in outer:
        raise RunsItselfError
    if is_torchserve_file(path):
        return check_torchserve_file(project, path)
    inner: Callable[[Path], Graph] = functools.cache(lambda other: workflow_graph(project, other, (*outer, path)))
    return check(project, source.read(path, WorkflowFile), inner)


def handler_graph(project: Project, path: Path) -> Graph:
    """A handler as a workflow of a single node, as which it is also served. Raises CheckError."""
    file = project.read_handler(path)
    kind = project.handler_class(file)
    project.settings(file, kind)
    takes, gives = types_of(kind)
    model = file.value
    request = compile_expression(REQUEST, {REQUEST: takes})
    found = handler_code(kind)(file, model.run.device)
    code = Code(
        name=model.name,
        takes={"item": request},
        sees_skipped=frozenset(),
        gives=gives,
        kind=found,
        batch=found.batch,
        yields=streams(kind),
    )
    node = Node(
        name=model.name,
        branches=(Branch(None, code),),
        each=(),
        when=None,
        result=list[gives] if code.yields else gives,  # type: ignore[valid-type]
        needs=frozenset({REQUEST}),
        depth=1,
    )
    output = Output({"": result_of(node)})
    return Graph(
        name=model.name,
        version=model.version,
        does=model.card.does,
        path=path,
        functions_path=None,
        request=takes,
        nodes={model.name: node},
        output=output,
        serve=model.serve,
        redact=redaction(file, lambda: project.module(path.parent / model.code_file)),
    )
