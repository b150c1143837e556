"""What goes into an archive: a small project with the runtime part of this package, ready to be served."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from torchserve_dag import runtime as carried
from torchserve_dag.archives import imports, mar, stamp, weights
from torchserve_dag.archives.mar import BUILD
from torchserve_dag.archives.signature import signature
from torchserve_dag.archives.store import Origin, part_of_archive
from torchserve_dag.pictures.mermaid import mermaid
from torchserve_dag.runtime.data import codec, plain
from torchserve_dag.runtime.data.source import CheckError, Problem, Source
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.graph.torchserve.kinds import ArchiveCode, RowsFunctionCode
from torchserve_dag.runtime.graph.torchserve.nodes import takes_rows
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.project.handler_file import Card, HandlerFile, Mode
from torchserve_dag.runtime.project.weight_files import files
from torchserve_dag.runtime.worker.protocol import PROTOCOL

_ENTRY = '''"""What TorchServe's worker imports."""

from torchserve_dag.runtime.worker.torchserve.{} import handle

__all__ = ["handle"]
'''


@dataclass(frozen=True)
class Contents:
    """An archive's files, by their paths inside."""

    small: dict[str, bytes]
    large: dict[str, Path]
    """Weights, and archives that a workflow's nodes run: copied from disk, never held in memory."""
    weights: dict[str, str]
    """The SHA-256 of each file or folder of weights, those that workers fetch among them."""

    def origin(self) -> Origin:
        """What of the project is in it."""
        files = {path: (len(body), zlib.crc32(body)) for path, body in self.small.items()}
        files |= {path: mar.checksum(file) for path, file in self.large.items() if part_of_archive(path) == "project"}
        return Origin({path: one for path, one in files.items() if part_of_archive(path) == "project"}, self.weights)


def contents(project: Project, graph: Graph) -> Contents:
    """The archive of a workflow, or of a handler as a graph of one node.

    Raises CheckError for whatever `build` refuses, or MissingWeightsError where only weights are not here.
    """
    _check_request(graph)
    _check_output(graph)
    modules = imports.own_modules(project.root, sources(graph))
    handlers = list({file.path: file for file in graph.handlers.values()}.values())
    digests = weights.verified(project, handlers)
    small = runtime()
    small |= {f"{path.parent.name}/{path.name}": path.read_bytes() for path in graph.files}
    small |= imports.packed(modules)
    mode: Mode = graph.serve.mode or ("asynchronous" if graph.streams else "batched")
    small |= served_as(mode, graph)
    small[BUILD] = to_json(_description(project, graph, handlers, digests, modules))
    packed = packed_weights(project, [file.value.card for file in handlers])
    return Contents(small, packed | _archives(project, graph), digests)


def _check_request(graph: Graph) -> None:
    if not (takes_rows(graph) or codec.reads(graph.request)):
        what = f"it takes {plain.name_of(graph.request)}, which no client can send"
        help_ = "take a photo, a text, bytes, data that fits JSON, or a dataclass with such fields"
        raise CheckError([Problem(str(graph.path), 1, what, help_)])


def _check_output(graph: Graph) -> None:
    for name, value in graph.output.values.items():
        if not (plain.fits_json(value.type) if name else codec.writes(value.type)):
            what = f'it answers with "{value.text}", which is {plain.name_of(value.type)} and cannot be written as JSON'
            help_ = "answer with a photo alone, or with JSON about it"
            raise CheckError([Problem(str(graph.path), 1, what, help_)])


def sources(graph: Graph) -> set[Path]:
    """The Python files that a graph was read from, without those of TorchServe's own workflows."""
    foreign = {code.kind.file for code in graph.codes.values() if isinstance(code.kind, RowsFunctionCode)}
    return {path for path in graph.files if path.suffix == ".py"} - foreign


def runtime() -> dict[str, bytes]:
    """What of this package runs in a worker: `__init__.py` and all of `runtime/`, by path inside an archive."""
    folder = Path(carried.__path__[0])
    package = folder.parent
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    paths = [package / "__init__.py", *sorted(files)]
    return {f"{package.name}/{path.relative_to(package).as_posix()}": path.read_bytes() for path in paths}


def packed_weights(project: Project, cards: Iterable[Card]) -> dict[str, Path]:
    """The weights of some cards, without those that workers fetch."""
    return {
        f"weights/{path.relative_to(project.weights).as_posix()}": path
        for card in cards
        for one in card.weights
        if not one.fetch_from
        for path in files(project.weights / one.file)
    }


def _archives(project: Project, graph: Graph) -> dict[str, Path]:
    """The TorchServe archives that nodes run, packed beside the workflow's file, where they are looked for first."""
    folders = (project.root / "workflows", project.root / "model_store", project.root)
    packed: dict[str, Path] = {}
    for code in graph.codes.values():
        if isinstance(code.kind, ArchiveCode):
            archive = code.kind.archive
            folder = next(folder for folder in folders if archive.is_relative_to(folder))
            files = [path for path in archive.rglob("*") if path.is_file()] if archive.is_dir() else [archive]
            packed |= {f"workflows/{path.relative_to(folder).as_posix()}": path for path in files}
    return packed


def served_as(mode: Mode, graph: Graph) -> dict[str, bytes]:
    """The two files that TorchServe reads: the module that a worker imports, and `model-config.yaml`."""
    entry = _ENTRY.format(mode)
    settings = yaml.safe_dump(_settings(mode, graph), sort_keys=True)
    return {mar.ENTRY: entry.encode(), mar.SETTINGS: settings.encode()}


def _settings(mode: Mode, graph: Graph) -> dict[str, Any]:
    """The content of `model-config.yaml`; TorchServe's Java class ModelConfig defines the keys."""
    serve = graph.serve
    settings: dict[str, Any] = {
        "minWorkers": serve.workers,
        "maxWorkers": serve.workers,
        "batchSize": serve.batch,
        "maxBatchDelay": serve.delay_ms,
        "jobQueueSize": serve.queue,
        # The worker itself answers 504 after `timeout_s`; TorchServe ends only a worker that hangs.
        "responseTimeout": serve.timeout_s + 10,
        "startupTimeout": serve.startup_timeout_s,
    }
    if mode == "asynchronous":
        # With larger batches TorchServe fails: it removes requests from a map while it iterates over it.
        settings |= {"asyncCommunication": True, "batchSize": 1}
    handlers = graph.handlers.values()
    if handlers and all(file.value.run.device == "cpu" for file in handlers):
        settings["deviceType"] = "cpu"  # otherwise TorchServe would assign GPUs to workers that do not use them
    return settings


def _description(
    project: Project,
    graph: Graph,
    handlers: list[Source[HandlerFile]],
    digests: dict[str, str],
    modules: dict[str, Path],
) -> dict[str, Any]:
    is_handler = _is_handler(graph)
    fields: dict[str, Any] = {
        "protocol": PROTOCOL,
        "kind": "handler" if is_handler else "workflow",
        "name": graph.name,
        "version": graph.version,
        "file": f"{'handlers' if is_handler else 'workflows'}/{graph.path.name}",
        "max_inside": graph.serve.max_inside,
        "inputs": stamp.inputs(project.root, digests, imports.digests(modules), graph.all_requirements),
        **signature(graph),
    }
    if is_handler:
        return fields | {"card": plain.flatten(handlers[0].value.card)}
    cards: dict[str, Any] = {}
    for file in handlers:
        name, version = file.value.name, file.value.version
        cards[f"{name}/{version}" if name in cards else name] = plain.flatten(file.value.card)
    return fields | {"card": {"does": graph.does, "handlers": cards}, "graph": mermaid(graph)}


def _is_handler(graph: Graph) -> bool:
    return graph.path.parent.name == "handlers"


def to_json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
