"""Handlers that stay loaded from one state of a project's folder to the next."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection

from torchserve_dag.archives.imports import digests, own_modules
from torchserve_dag.runtime.data.source import Source
from torchserve_dag.runtime.handler import types_of
from torchserve_dag.runtime.models.continuous import ContinuousModel
from torchserve_dag.runtime.models.load import LoadedHandler
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.project.handler_file import HandlerFile
from torchserve_dag.runtime.project.modules import PREFIX
from torchserve_dag.runtime.project.weight_files import files


class LoadedHandlers:
    """A handler is loaded once for each content of its YAML file, its code with what that imports, and its weights."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self._stages: dict[tuple[str, str], LoadedHandler] = {}
        """By identity and device."""

    def __call__(self, file: Source[HandlerFile], device: str, load: Callable[[], LoadedHandler]) -> LoadedHandler:
        """A `Reuse` of runtime/models/load.py. Raises whatever loading raises."""
        key = (self.identity(file), device)
        stages = self._stages.get(key)
        if stages is None or stages.hangs or not self._may_stay(stages):
            stages = self._stages[key] = load()
        return stages

    def keep_only(self, identities: Collection[str]) -> None:
        """Forget all other handlers. Requests that are inside one of them hold it, and its threads, until they end; an
        engine is ended at once.
        """
        forgotten = [stages for key, stages in self._stages.items() if key[0] not in identities]
        self._stages = {key: stages for key, stages in self._stages.items() if key[0] in identities}
        for stages in forgotten:
            if isinstance(stages, ContinuousModel):
                stages.close()

    def identity(self, file: Source[HandlerFile]) -> str:
        """The same while nothing that the handler consists of has changed."""
        project, code = self._project, file.path.parent / file.value.code_file
        modules = digests(own_modules(project.root, [code]))
        paths = [path for one in file.value.card.weights for path in files(project.weights / one.file)]
        about = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]
        return hashlib.sha256(repr((file.path, file.path.read_bytes(), modules, about)).encode()).hexdigest()

    @staticmethod
    def _may_stay(stages: LoadedHandler) -> bool:
        """A class of the project is another class once its module is imported again, so its messages must not stay."""
        return PREFIX not in repr(types_of(type(stages.handler)))
