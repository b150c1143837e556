"""A project's folders: which handlers it has, and a handler's file, class and loaded form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from torchserve_dag.runtime.data import plain, source
from torchserve_dag.runtime.data.source import CheckError, Problem, Source
from torchserve_dag.runtime.handler import HANDLERS, AnyHandler, types_of
from torchserve_dag.runtime.project.handler_file import HandlerFile
from torchserve_dag.runtime.project.modules import Modules
from torchserve_dag.runtime.project.requirements import check_requirements

HandlerClass = type[AnyHandler]


def is_below(file: str) -> bool:
    """Whether a path that a project's file names stays below the folder that it is read in."""
    path = PurePosixPath(file)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


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

    @property
    def modules(self) -> Modules:
        """The project's own modules, as their files are now."""
        return Modules.of(self.root)

    def module(self, path: Path) -> ModuleType:
        """The module of a file in `handlers/` or `workflows/`. Raises CheckError."""
        return self.modules.load(path)

    def handler_class(self, file: Source[HandlerFile]) -> HandlerClass:
        """The class that a handler's code defines. Raises CheckError if it cannot be served."""
        path = file.path.parent / file.value.code_file
        if not path.is_file():
            raise CheckError([file.problem(("code",), f"there is no {path}", "write the handler's class there")])
        check_requirements(file)
        module = self.module(path)
        classes = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, HANDLERS) and value.__module__ == module.__name__
        ]
        if len(classes) != 1:
            what = f"{len(classes)} subclasses of Handler or ContinuousHandler, where one is meant"
            raise CheckError([Problem(str(path), 1, what)])
        try:
            types = types_of(classes[0])
        except Exception as error:  # noqa: BLE001 (annotations are the user's, and evaluated)
            what = str(error) if isinstance(error, TypeError) else f"the annotations of {classes[0].__name__}: {error}"
            raise CheckError([Problem(str(path), 1, what)]) from None
        if reasons := dict.fromkeys(filter(None, map(plain.unresolved, types))):
            raise CheckError([Problem(str(path), 1, reason) for reason in reasons])
        return classes[0]

    def settings(self, file: Source[HandlerFile], kind: HandlerClass) -> Any:
        """A handler's settings as an object of its `Settings`. Raises CheckError."""
        try:
            return plain.build(kind.Settings, file.value.settings)
        except plain.WrongDataError as error:
            raise CheckError(
                [file.problem(("settings", *w.path), f"settings: {w.what}", w.help) for w in error.wrongs]
            ) from None
        except Exception as error:  # noqa: BLE001 (its annotations and its __post_init__ are the user's)
            what = f"settings: {kind.__name__}.Settings raised {type(error).__name__}: {error}"
            raise CheckError([file.problem(("settings",), what)]) from None
