"""A project's folders: which handlers it has, and a handler's file, class and loaded form."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torchserve_dag.runtime.data import plain, source
from torchserve_dag.runtime.data.source import CheckError, Problem, Source
from torchserve_dag.runtime.handler import Handler, types_of
from torchserve_dag.runtime.project.handler_file import HandlerFile

HandlerClass = type[Handler[Any, Any, Any, Any]]


@dataclass(frozen=True)
class Project:
    """A folder with `handlers/`, `workflows/` and `weights/`; an unpacked archive is a project, too."""

    root: Path

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    def files(self, folder: str) -> list[Path]:
        """The YAML files in `handlers` or `workflows`, and TorchServe's `.war` files, sorted, without hidden files."""
        return sorted(path for path in (self.root / folder).glob("[!.]*.*") if path.suffix in {".yaml", ".war"})

    def find(self, folder: str, reference: str) -> Path | None:
        """The file that `NAME` or `NAME/VERSION` names: `NAME.yaml`, or the file that declares that version."""
        name, _, version = reference.partition("/")
        if not version:
            paths = (self.root / folder / f"{name}{suffix}" for suffix in (".yaml", ".war"))
            return next((path for path in paths if path.is_file()), None)
        for path in self.files(folder):
            if path.suffix == ".war":
                continue
            data, _ = source.read_plain(path)
            if isinstance(data, dict) and (data.get("name"), data.get("version")) == (name, version):
                return path
        return None

    def references(self, folder: str) -> list[str]:
        """Every name that `find` knows, for hints."""
        return [path.stem for path in self.files(folder)]

    def handler(self, reference: str) -> Source[HandlerFile]:
        """A handler's file. Raises CheckError."""
        path = self.find("handlers", reference)
        if path is None:
            where = self.root / "handlers"
            hint = plain.did_you_mean(reference, self.references("handlers"))
            raise CheckError([Problem(str(where), 1, f'there is no handler "{reference}"', hint)])
        return self.read_handler(path)

    def read_handler(self, path: Path) -> Source[HandlerFile]:
        return source.read(path, HandlerFile)

    def handler_class(self, file: Source[HandlerFile]) -> HandlerClass:
        """The class that a handler's code defines. Raises CheckError if it cannot be served."""
        path = file.path.parent / file.value.code_file
        if not path.is_file():
            raise CheckError([file.problem(("code",), f"there is no {path}", "write the handler's class there")])
        module = import_file(path)
        classes = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Handler) and value.__module__ == module.__name__
        ]
        if len(classes) != 1:
            what = f"{len(classes)} subclasses of Handler, where one is meant"
            raise CheckError([Problem(str(path), 1, what)])
        try:
            types_of(classes[0])
        except (TypeError, NameError) as error:
            raise CheckError([Problem(str(path), 1, str(error))]) from None
        return classes[0]

    def settings(self, file: Source[HandlerFile], kind: HandlerClass) -> Any:
        """A handler's settings as an object of its `Settings`. Raises CheckError."""
        try:
            return plain.build(kind.Settings, file.value.settings)
        except plain.WrongDataError as error:
            raise CheckError(
                [file.problem(("settings", *w.path), f"settings: {w.what}", w.help) for w in error.wrongs]
            ) from None


def import_file(path: Path) -> ModuleType:
    """The module at `path`. It is imported once for each content of the file, under a name of its own.

    So two versions of a project's code can be loaded in one process. Raises CheckError.
    """
    digest = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:12]
    name = f"torchserve_dag_project_{digest}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CheckError([Problem(str(path), 1, "not a Python file")])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is being imported
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        del sys.modules[name]
        file = error.filename or str(path)  # the mistake may be in a file that this file imports
        raise CheckError([Problem(file, error.lineno or 1, f"not valid Python: {error.msg}")]) from None
    except Exception as error:
        del sys.modules[name]
        line = _line_in(error, path)
        raise CheckError([Problem(str(path), line, f"importing it raised {type(error).__name__}: {error}")]) from error
    return module


def _line_in(error: Exception, path: Path) -> int:
    line, trace = 1, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path.absolute()):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
