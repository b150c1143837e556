"""The `.war` export: a workflow for TorchServe 0.12.0's own engine, with the archives of its nodes.

The `.war` and these archives go into a folder of their own, `workflow_store/`. TorchServe looks for a workflow's models
in its model store; in the project's model store, it would also serve each of them as a model by itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml
from workflow_archiver.workflow_packaging import package_workflow
from workflow_archiver.workflow_packaging_utils import WorkflowExportUtils

from torchserve_dag.archives import mar, store
from torchserve_dag.archives.contents import Contents, packed_weights, served_as, to_json
from torchserve_dag.archives.mar import BUILD
from torchserve_dag.archives.store import Built, Target, place
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.graph.torchserve.segment import Segment, parents, segments
from torchserve_dag.runtime.project.folders import Project

SPEC = "workflow.yaml"
FUNCTIONS = "functions.py"


class NotForTorchServeError(CheckError):
    """A workflow that TorchServe's own engine cannot run, but that has no other problem."""


def export(
    project: Project, target: Target, graph: Graph, whole: Contents, folder: Path, *, force: bool = False
) -> list[Built]:
    """Write a workflow's `.war` and its nodes' archives into `folder`; `whole` is what its `.mar` holds.

    Raises CheckError.
    """
    all_segments = _segments(target, graph)
    built = []
    for name, segment in all_segments.items():
        content = _part_of(project, whole, segment)
        stem = _stem(graph, name)

        def write(part: Path, stem: str = stem, content: Contents = content) -> None:
            mar.write(part, stem.replace(".", "_"), graph.version, content.small, content.large)

        built.append(place(target, folder / f"{stem}.mar", write, origin=whole.origin(), force=force))
    spec = yaml.safe_dump(_spec(graph, all_segments), sort_keys=False)
    path = folder / f"{graph.name}-{graph.version}.war"
    same = all(archive.state in {"unchanged", "kept"} for archive in built)
    built.append(
        place(target, path, lambda part: _write(part, graph.name, spec), origin=None, force=force, same_project=same)
    )
    return built


def refuse_other_input(target: Target, graph: Graph, whole: Contents, folder: Path) -> None:
    """Raises CheckError where `export` would, and writes nothing."""
    for name in _segments(target, graph):
        store.refuse_other_input(target, folder / f"{_stem(graph, name)}.mar", whole.origin())


def _segments(target: Target, graph: Graph) -> dict[str, Segment]:
    try:
        return segments(graph)
    except ValueError as error:
        what = f"TorchServe's own engine cannot run this workflow: {error}"
        problem = target.file.problem(("nodes",), what, "serve its .mar, which has no such limits")
        raise NotForTorchServeError([problem]) from None


def _stem(graph: Graph, node: str) -> str:
    return f"{graph.name}-{graph.version}-{node}"


def _part_of(project: Project, whole: Contents, segment: Segment) -> Contents:
    """A segment's archive: the workflow's, with the weights of its model alone, and the segment's name."""
    card = segment.graph.handlers[segment.node].value.card
    build = to_json(json.loads(whole.small[BUILD]) | {"segment": segment.node})
    small = {
        **whole.small,
        **served_as("batched", segment.graph),
        BUILD: build,
    }  # TorchServe's engine has only batched mode
    return Contents(small, packed_weights(project, [card]), whole.weights)


def _spec(graph: Graph, all_segments: dict[str, Segment]) -> dict[str, Any]:
    """TorchServe's workflow specification. Every setting is written out, because the default batch size is 1."""
    models: dict[str, Any] = {
        "min-workers": graph.serve.workers,
        "max-workers": graph.serve.workers,
        "batch-size": graph.serve.batch,
        "max-batch-delay": graph.serve.delay_ms,
        # A retry would run a node again after any error, and its client would wait twice.
        "retry-attempts": 1,
        "timeout-ms": (graph.serve.timeout_s + 10) * 1000,
    }
    dag: dict[str, list[str]] = {name: [] for name in all_segments}
    for name in all_segments:
        models[name] = {"url": f"{_stem(graph, name)}.mar"}
        for parent in parents(all_segments, name):
            dag[parent].append(name)
    return {"models": models, "dag": dag if len(dag) == 1 else {name: after for name, after in dag.items() if after}}


def _write(target: Path, name: str, spec: str) -> None:
    with tempfile.TemporaryDirectory(prefix="torchserve-dag-") as folder:
        root = Path(folder)
        (root / SPEC).write_text(spec, "utf-8")
        # TorchServe fails on a workflow without a functions file, also where no node is a function.
        (root / FUNCTIONS).write_text('"""This workflow has no function nodes."""\n', "utf-8")
        arguments = argparse.Namespace(
            workflow_name=name,
            spec_file=str(root / SPEC),
            handler=str(root / FUNCTIONS),
            extra_files=None,
            export_path=str(root),
            force=True,
        )
        with mar.private_tempdir(root / "tmp"):
            package_workflow(arguments, WorkflowExportUtils.generate_manifest_json(arguments))
        mar.rewrite(root / f"{name}.war", target, {})
