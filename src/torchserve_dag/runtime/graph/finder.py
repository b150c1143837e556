"""The code that a workflow's file names, with its types."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torchserve_dag.runtime.compat import archive as archives
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.runtime.graph.graph import Graph, WorkflowCode
from torchserve_dag.runtime.graph.kinds import ServedCode, handler_code
from torchserve_dag.runtime.graph.problems import Place, Problems
from torchserve_dag.runtime.graph.signature import ONE, Signature, signature_of
from torchserve_dag.runtime.graph.torchserve.kinds import ArchiveCode
from torchserve_dag.runtime.graph.type_names import known_types, type_named
from torchserve_dag.runtime.handler import streams, types_of
from torchserve_dag.runtime.project.folders import Project, is_below
from torchserve_dag.runtime.project.workflow_file import CodeFile, ServedFile, TorchServeFile, WorkflowFile


class RunsItselfError(Exception):
    """A workflow contains itself, directly or through another one."""


class Finder:
    """Finds the code for one workflow's file. `inner` gives the graph of another workflow's file."""

    def __init__(
        self, project: Project, file: WorkflowFile, path: Path, problems: Problems, inner: Callable[[Path], Graph]
    ) -> None:
        self.project = project
        self.file = file
        self.functions_path = path.parent / file.code_file
        self.reads_functions = False
        """Whether the graph has a function or a type of that file."""
        self.problems = problems
        self.inner = inner

    def find(self, place: Place, code: CodeFile) -> Signature | None:
        """Find the code that the file names at `place`; None if there are problems, which are added."""
        if code.handler is not None:
            return self._handler((*place, "handler"), code.handler, code.device)
        if code.function is not None:
            return self._function((*place, "function"), code.function)
        if code.workflow is not None:
            return self._workflow((*place, "workflow"), code.workflow)
        if code.served is not None:
            return self._served((*place, "served"), code.served)
        if code.torchserve is not None:
            return self._archive((*place, "torchserve"), code.torchserve)
        raise TypeError("workflow_file.py accepts only code with something to run")

    def _handler(self, place: Place, reference: str, device: str | None) -> Signature | None:
        path = self.project.find("handlers", reference)
        if path is None:
            hint = plain.did_you_mean(reference, self.project.references("handlers"))
            self.problems.add(place, f'there is no handler "{reference}"', hint)
            return None
        try:
            file = self.project.read_handler(path)
            kind = self.project.handler_class(file)
            self.project.settings(file, kind)
        except CheckError as error:
            self.problems.add_all(error)
            return None
        takes, gives = types_of(kind)
        code = handler_code(kind)(file, device or file.value.run.device)
        return Signature(reference, code, {ONE: takes}, gives, yields=streams(kind))

    def _function(self, place: Place, name: str) -> Signature | None:
        path = self.functions_path
        if not path.is_file():
            self.problems.add(place, f"there is no {path}", f"write the function {name} there")
            return None
        try:
            module = self.functions()
        except CheckError as error:
            self.problems.add_all(error)
            return None
        function = getattr(module, name, None)
        if not inspect.isfunction(function):
            known = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
            self.problems.add(place, f'{path} has no function "{name}"', plain.did_you_mean(name, known))
            return None
        return signature_of(place, function, self.problems)

    def functions(self) -> ModuleType:
        """The module of the workflow's Python file. Raises CheckError."""
        self.reads_functions = True
        return self.project.module(self.functions_path)

    def _workflow(self, place: Place, reference: str) -> Signature | None:
        path = self.project.find("workflows", reference)
        if path is None:
            hint = plain.did_you_mean(reference, self.project.references("workflows"))
            self.problems.add(place, f'there is no workflow "{reference}"', hint)
            return None
        try:
            graph = self.inner(path)
        except RunsItselfError:
            self.problems.add(place, f"{reference} runs this workflow, so it would never end", "run another")
            return None
        except CheckError as error:
            self.problems.add_all(error)
            return None
        return Signature(reference, WorkflowCode(graph), {ONE: graph.request}, graph.answer)

    def _served(self, place: Place, file: ServedFile) -> Signature | None:
        name, _, version = file.model.partition("/")
        if name == self.file.name and version in {"", self.file.version}:
            self.problems.add((*place, "model"), "it calls itself, so it would never end", "call another model")
            return None
        takes, gives, described = self._described(place, file)
        takes = self._type((*place, "takes"), file.takes, takes)
        gives = self._type((*place, "gives"), file.gives, gives)
        served = ServedCode(name, version or None, file.at, file.token, file.ca, described)
        return Signature(file.model, served, {ONE: takes}, gives)

    def _described(self, place: Place, file: ServedFile) -> tuple[Any, Any, tuple[Path, ...]]:
        """The types of a served model whose source is in this project, and the files that declare them."""
        handler = self.project.find("handlers", file.model)
        workflow = self.project.find("workflows", file.model)
        try:
            if workflow is not None:
                graph = self.inner(
                    workflow
                )  # read even if the types are given, because the other workflow must not call this one
                return graph.request, graph.answer, tuple(sorted(graph.files))
            if handler is not None and not (file.takes and file.gives):
                source = self.project.read_handler(handler)
                takes, gives = types_of(self.project.handler_class(source))
                return takes, gives, (handler, handler.parent / source.value.code_file)
        except RunsItselfError:
            what = f"{file.model} calls this workflow, so each would wait for the other"
            self.problems.add((*place, "model"), what, "call another model")
        except CheckError as error:
            self.problems.add_all(error)
        return Any, Any, ()

    def _archive(self, place: Place, file: TorchServeFile) -> Signature | None:
        folders = (self.functions_path.parent, self.project.root / "model_store", self.project.root)
        archive = next((path for folder in folders if (path := folder / file.archive).is_file()), None)
        if not is_below(file.archive):
            hint = "copy it into model_store/, and write its name"
            self.problems.add((*place, "archive"), f"{file.archive} is not below the project's root", hint)
            return None
        if archive is None:
            hint = "put it into model_store/"
            self.problems.add((*place, "archive"), f"there is no archive {file.archive} in model_store/", hint)
            return None
        if not archives.handler_of(archive):
            what = f"{archive} is not an archive of torch-model-archiver's"
            self.problems.add((*place, "archive"), what, "its MAR-INF/MANIFEST.json names no handler")
            return None
        takes = self._type((*place, "takes"), file.takes, Any)
        gives = self._type((*place, "gives"), file.gives, Any)
        return Signature(file.archive, ArchiveCode(archive), {ONE: takes}, gives, yields=archives.streams(archive))

    def _type(self, place: Place, text: str | None, default: Any) -> Any:
        if text is None:
            return default
        try:
            module = self.functions() if self.functions_path.is_file() else None
            kind = type_named(text, known_types(module))
        except ValueError as error:
            self.problems.add(place, str(error))
        except CheckError as error:
            self.problems.add_all(error)
        else:
            if reason := plain.unresolved(kind):
                self.problems.add(place, reason)
            return kind
        return Any
