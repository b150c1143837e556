"""Which workflows and handlers a project's folder has now, each loaded; what has not changed stays loaded."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchserve_dag.archives.archive import ModelVersion
from torchserve_dag.archives.build import targets
from torchserve_dag.archives.contents import sources
from torchserve_dag.archives.imports import digests, own_modules
from torchserve_dag.archives.signature import signature
from torchserve_dag.archives.store import Target
from torchserve_dag.dev.models import LoadedHandlers
from torchserve_dag.runtime.data.source import CheckError, Problem
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.worker.protocol import Service
from torchserve_dag.runtime.worker.service import WorkflowService

logger = logging.getLogger(__name__)

_SKIPPED = frozenset({"model_store", "workflow_store", "tests", "loadtests", "node_modules", "build", "dist"})
"""Folders of a project in which nothing is looked for."""

Stamp = tuple[int, int]
"""A file's size in bytes, and the time of its last change in nanoseconds."""


@dataclass(frozen=True, slots=True)
class FolderState:
    """What one state of the folder serves."""

    services: Mapping[ModelVersion, Service]
    new: frozenset[ModelVersion]
    """Those that are not the services of the state before."""
    problems: Sequence[Problem]
    """What is wrong. A version with a problem is served as it was last loaded without one, if it was."""


@dataclass(frozen=True, slots=True)
class _Version:
    """A version that is served."""

    service: WorkflowService
    path: Path
    """Its YAML file."""
    content: str
    """All that it was loaded from."""
    handlers: frozenset[str]
    """The identities of its handlers, which are a part of that."""


@dataclass(slots=True)
class DevLoader:
    """Loads a project's folder again and again. `names`: workflows and handlers to serve; by default all workflows, or
    all handlers where there is no workflow.
    """

    project: Project
    names: Sequence[str] = ()
    _handlers: LoadedHandlers = field(init=False)
    _versions: dict[ModelVersion, _Version] = field(default_factory=dict)
    """What is served."""
    _failed: frozenset[ModelVersion] = frozenset()
    """What of it could not be loaded again: it is as it was."""

    def __post_init__(self) -> None:
        self._handlers = LoadedHandlers(self.project)

    def load(self) -> FolderState:
        """Load the folder as it is now. A version that cannot be loaded is a problem, and costs the others nothing."""
        problems: list[Problem] = []
        chosen = targets(self.project, self.names, problems)
        if not self.names and self.project.files("workflows"):
            chosen = [target for target in chosen if target.folder == "workflows"]
        before = self._versions
        served: dict[ModelVersion, _Version] = {}
        failed = before.keys() - {(target.name, target.version) for target in chosen}
        for target in chosen:
            key = (target.name, target.version)
            found = None
            try:
                found = self._load(target, before.get(key))
            except CheckError as error:
                problems += [one for one in error.problems if one not in problems]
            except (Exception, SystemExit) as error:  # whatever a handler's `load` raises
                logger.exception("%s %s cannot be loaded", *key)
                problems.append(Problem(str(target.file.path), 1, f"loading it raised {type(error).__name__}: {error}"))
            if found:
                served[key] = found
            else:
                failed.add(key)
        if problems:  # a file that cannot be read names no version: what it was is served on
            loaded = {one.path for one in served.values()}  # perhaps under another version
            kept = {key: before[key] for key in failed & before.keys()}
            served |= {key: one for key, one in kept.items() if one.path.exists() and one.path not in loaded}
        self._versions, self._failed = served, frozenset(failed)
        self._handlers.keep_only({identity for one in served.values() for identity in one.handlers})
        new = frozenset(key for key, one in served.items() if before.get(key) is not one)
        return FolderState({key: one.service for key, one in served.items()}, new, problems)

    def hangs(self) -> bool:
        """Whether a model of what is served hangs, and loading the folder again would replace it."""
        return any(one.service.hangs() for key, one in self._versions.items() if key not in self._failed)

    def _load(self, target: Target, before: _Version | None) -> _Version:
        """Raises CheckError, and whatever loading raises."""
        graph = read_graph(self.project, target.file.path)
        handlers = frozenset(self._handlers.identity(file) for file in graph.handlers.values())
        content = self._content(graph, handlers)
        if before and before.content == content and not before.service.hangs():
            return before
        about = {"name": graph.name, "version": graph.version, "file": f"{target.folder}/{graph.path.name}"}
        service = WorkflowService(self.project, graph, about | signature(graph), None, self._handlers)
        return _Version(service, target.file.path, content, handlers)

    def _content(self, graph: Graph, handlers: Collection[str]) -> str:
        """All that a graph is made of: its files, the modules that they import, and its handlers."""
        modules = digests(own_modules(self.project.root, sources(graph)))
        files = {str(path): path.read_bytes() for path in graph.files}
        return repr((files, modules, sorted(handlers)))


def stamps(root: Path) -> dict[Path, Stamp]:
    """Of each file that what is served may depend on."""
    found: dict[Path, Stamp] = {}
    folders = [root]
    while folders:
        try:
            paths = list(folders.pop().iterdir())
        except OSError:  # deleted meanwhile
            continue
        for path in paths:
            if path.name.startswith((".", "__pycache__")) or path.name in _SKIPPED:
                continue
            try:
                about = path.stat()
                if path.is_dir():
                    folders.append(path)
                else:
                    found[path] = (about.st_size, about.st_mtime_ns)
            except OSError:
                continue
    return found
