"""Handlers that stay loaded from one state of a project's folder to the next."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from torchserve_dag.archives import weights
from torchserve_dag.archives.imports import digests, own_modules
from torchserve_dag.runtime.data.source import Source
from torchserve_dag.runtime.handler import types_of
from torchserve_dag.runtime.models.stages import Stages
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.project.handler_file import HandlerFile

_OWN = "torchserve_dag_project_"
"""How the names of a project's own modules begin in `sys.modules`."""


class LoadedHandlers:
    """A handler is loaded once for each content of its YAML file, its code with what that imports, and its weights."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self._stages: dict[tuple[str, str], Stages] = {}
        """By identity and device."""
        self._wanted: set[str] = set()
        """The identities that the state of the folder that is being loaded has."""
        self.loads = 0
        """How many handlers have been loaded so far."""

    def __call__(self, file: Source[HandlerFile], device: str, load: Callable[[], Stages]) -> Stages:
        """A `Reuse` of runtime/models/load.py. Raises whatever loading raises."""
        key = (self.keep(file), device)
        stages = self._stages.get(key)
        if stages is None or stages.hangs or not self._may_stay(stages):
            stages = self._stages[key] = load()
            self.loads += 1
        return stages

    def keep(self, file: Source[HandlerFile]) -> str:
        """Keep a handler over the next `forget_others`, if it is loaded. Returns its identity."""
        identity = self.identity(file)
        self._wanted.add(identity)
        return identity

    def forget_others(self) -> None:
        """Close every handler that was not asked for since the last call."""
        for key in [key for key in self._stages if key[0] not in self._wanted]:
            self._stages.pop(key).close()
        self._wanted.clear()

    def identity(self, file: Source[HandlerFile]) -> str:
        """The same while nothing that the handler consists of has changed."""
        project, code = self._project, file.path.parent / file.value.code_file
        modules = digests(own_modules(project.root, [code]))
        paths = [path for one in file.value.card.weights for path in weights.files(project.weights / one.file)]
        about = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]
        return hashlib.sha256(repr((file.path, file.path.read_bytes(), modules, about)).encode()).hexdigest()

    @staticmethod
    def _may_stay(stages: Stages) -> bool:
        """A class of the project is another class once its module is imported again, so its messages must not stay."""
        return _OWN not in repr(types_of(type(stages.handler)))
