"""What goes into an archive: a small project with the runtime part of this package, ready to be served."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import torchserve_dag
from torchserve_dag import plain
from torchserve_dag.archives import mar, stamp, weights
from torchserve_dag.engine.graph import Graph
from torchserve_dag.handler_file import HandlerFile
from torchserve_dag.project import Project
from torchserve_dag.source import Source

BUILD = "build.json"
"""What an archive says about itself: which file is served, its card, what it was built from."""

RUNTIME = ("*.py", "engine/*.py")
"""The part of this package that a worker needs. Each archive has its own copy, and keeps it."""

_NOT_RUNTIME = {"__main__.py"}

_ENTRY = b'"""What a worker imports."""\n\nfrom torchserve_dag.service import handle\n\n__all__ = ["handle"]\n'


@dataclass(frozen=True)
class Contents:
    """An archive's files, by their paths inside."""

    small: dict[str, bytes]
    large: dict[str, Path]
    """Weights, and archives that a workflow's nodes run: copied from disk, never held in memory."""


def contents(project: Project, graph: Graph) -> Contents:
    """The archive of a workflow, or of a handler as a graph of one node.

    Raises CheckError, or MissingWeightsError where only weights are not here.
    """
    handlers = list({file.path: file for file in graph.handlers.values()}.values())
    digests = weights.verified(project, handlers)
    small = runtime()
    for file in handlers:
        _put(small, "handlers", file.path, file.path.parent / file.value.code_file)
    if not _is_handler(graph):
        _put(small, "workflows", graph.path, graph.functions_path)
    small[mar.ENTRY] = _ENTRY
    small[mar.SETTINGS] = yaml.safe_dump(_settings(graph, handlers), sort_keys=True).encode()
    small[BUILD] = to_json(_description(project, graph, handlers, digests))
    return Contents(small, packed_weights(project, digests) | _archives(project, graph))


def runtime() -> dict[str, bytes]:
    """The runtime part of this package, by path inside an archive."""
    package = Path(torchserve_dag.__file__).parent
    paths = sorted(path for pattern in RUNTIME for path in package.glob(pattern) if path.name not in _NOT_RUNTIME)
    return {f"{package.name}/{path.relative_to(package).as_posix()}": path.read_bytes() for path in paths}


def _put(small: dict[str, bytes], folder: str, *paths: Path | None) -> None:
    for path in paths:
        if path is not None:
            small[f"{folder}/{path.name}"] = path.read_bytes()


def packed_weights(project: Project, names: Iterable[str]) -> dict[str, Path]:
    return {
        f"weights/{path.relative_to(project.weights).as_posix()}": path
        for name in names
        for path in weights.files(project.weights / name)
    }


def _archives(project: Project, graph: Graph) -> dict[str, Path]:
    """The archives that the nodes of a TorchServe workflow run, where its file finds them first: beside it."""
    folders = (graph.path.parent, project.root / "model_store", project.root)
    found = {}
    for node in graph.nodes.values():
        archive = node.rows.archive if node.rows else None
        if archive:
            folder = next(folder for folder in folders if archive.is_relative_to(folder))
            found[f"workflows/{archive.relative_to(folder).as_posix()}"] = archive
    return found


def _settings(graph: Graph, handlers: list[Source[HandlerFile]]) -> dict[str, Any]:
    """TorchServe's `model-config.yaml`; its Java class ModelConfig names the keys."""
    serve = graph.serve
    settings: dict[str, Any] = {
        "minWorkers": serve.workers,
        "maxWorkers": serve.workers,
        "batchSize": serve.batch,
        "maxBatchDelay": serve.delay_ms,
        # The worker answers 504 by itself at `timeout_s`; only one that hangs is ended by TorchServe.
        "responseTimeout": serve.timeout_s + 10,
        "startupTimeout": serve.startup_timeout_s,
    }
    if handlers and all(file.value.run.device == "cpu" for file in handlers):
        settings["deviceType"] = "cpu"  # or TorchServe shares out its GPUs to workers that use none
    return settings


def _description(
    project: Project, graph: Graph, handlers: list[Source[HandlerFile]], digests: dict[str, str]
) -> dict[str, Any]:
    is_handler = _is_handler(graph)
    fields: dict[str, Any] = {
        "kind": "handler" if is_handler else "workflow",
        "name": graph.name,
        "version": graph.version,
        "file": f"{'handlers' if is_handler else 'workflows'}/{graph.path.name}",
        "inputs": stamp.inputs(project.root, digests),
    }
    if is_handler:
        return fields | {"card": plain.flatten(handlers[0].value.card)}
    cards: dict[str, Any] = {}
    for file in handlers:
        name, version = file.value.name, file.value.version
        cards[f"{name}/{version}" if name in cards else name] = plain.flatten(file.value.card)
    return fields | {"card": {"does": graph.does, "handlers": cards}, "graph": graph.mermaid()}


def _is_handler(graph: Graph) -> bool:
    return graph.path.parent.name == "handlers"


def to_json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
