"""A project's own modules: what its handlers and functions import from each other, from the root and from `src/`.

Each project is a package with a name of its own in `sys.modules`, so that two versions of a project, each with its own
`helper.py`, live in one process. An import statement in one of a project's files looks into the project first, whenever
it runs and in whatever thread. An unpacked archive is a project too: its modules are in `src/`.
"""

from __future__ import annotations

import builtins
import importlib
import itertools
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.source import CheckError, Problem

FOLDERS = ("handlers", "workflows")
"""The folders whose files are served; as modules they are `handlers.NAME` and `workflows.NAME`."""
NEVER_OWN = frozenset({*sys.stdlib_module_names, "torchserve_dag"})
"""A file of such a name at a project's root is not what an import statement means."""

PREFIX = "torchserve_dag_project_"
"""How the names of projects' packages begin in `sys.modules`."""
_numbers = itertools.count()
_lock = threading.Lock()
_bare_names_lock = threading.RLock()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module's code is."""

    file: Path | None
    """None for a folder without `__init__.py`."""
    folder: Path | None
    """Where its submodules are; None for a module that is no package."""

    @property
    def shown(self) -> Path:
        """The file, or the folder without a file."""
        return self.file or self.folder or Path()


def places(root: Path, name: str) -> list[Place]:
    """Where a project has a module of that absolute name; an import takes the first."""
    top, *inside = name.split(".")
    bases = [root] if top in FOLDERS else [root / "src", root]
    candidates = [place for base in bases if top not in NEVER_OWN and (place := _in(base, top))]
    candidates.sort(key=lambda place: place.file is None)  # as in Python, a folder without __init__.py comes last
    for part in inside:
        candidates = [place for outer in candidates if outer.folder and (place := _in(outer.folder, part))]
    return candidates


def find(root: Path, name: str) -> Place | None:
    """The place of a project's own module; None if an import of that name means another."""
    return next(iter(places(root, name)), None)


def owns(root: Path, top: str) -> bool:
    """Whether an import of that name means the project.

    As in Python, an installed module comes before a folder without `__init__.py`. An archive has no such folders.
    """
    place = find(root, top)
    if place is None or place.file or top in FOLDERS:
        return place is not None
    installed = PathFinder.find_spec(top)
    return installed is None or installed.origin is None


def name_of(root: Path, file: Path) -> str:
    """The absolute name under which code imports a file of a project."""
    path = file.relative_to(root).with_suffix("")
    parts = path.parts[1:] if path.parts[0] == "src" and find(root, ".".join(path.parts[1:])) else path.parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def help_for(root: Path, importer: Path, name: str) -> str:
    """What to write instead, where `importer` imports a module that is nowhere."""
    top, *inside = name.split(".")
    beside = _in(importer.parent, top)
    if beside and importer.parent != root and importer.is_relative_to(root):
        full = ".".join([name_of(root, beside.file or beside.shown / "__init__.py"), *inside])
        return f"its name from the project's root is {full}: write `from {full} import …`, or move it to the root"
    outer = find(root, name.rpartition(".")[0]) if inside else None
    if outer and outer.folder:
        return plain.did_you_mean(inside[-1], [path.stem for path in outer.folder.glob("[!_.]*.py")])
    file = name.replace(".", "/") + ".py"
    return f"put {file} at the project's root or into src/, or install the package and name it under requirements"


class Modules:
    """The modules of one project, with the content that their files had when they were imported."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._package = f"{PREFIX}{next(_numbers)}"
        self._sources: dict[Path, bytes] = {}
        """The content of each file that was imported."""
        self._owns: dict[str, bool] = {}
        self._builtins = {**vars(builtins), "__import__": self.import_statement}
        package = ModuleType(self._package)
        package.__path__ = []
        sys.modules[self._package] = package
        _projects[self._package] = self
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)

    @classmethod
    def of(cls, root: Path) -> Modules:
        """The modules of the project at `root`: new ones where the file of an imported one has changed since."""
        root = root.resolve()
        with _lock:
            modules = _current.get(root)
            if modules is None or modules.changed():
                modules = _current[root] = cls(root)
            return modules

    def load(self, path: Path) -> ModuleType:
        """The module of a file of the project, mostly in `handlers/` or `workflows/`. Raises CheckError."""
        try:
            return importlib.import_module(".".join((self._package, *self._inside(path).with_suffix("").parts)))
        except SyntaxError as error:  # perhaps in a file that this file imports
            file, line, what = Path(error.filename or path), error.lineno or 1, f"not valid Python: {error.msg}"
            raise CheckError([self._problem(path, file, line, what)]) from None
        except (Exception, SystemExit) as error:
            file, line = self._line_in(error.__traceback__) or (path, 1)
            if isinstance(error, ModuleNotFoundError) and error.name and _missed_by(error.__traceback__, file):
                name = error.name.removeprefix(f"{self._package}.")
                what, help_ = f'there is no module "{name}"', help_for(self.root, file, name)
                raise CheckError([self._problem(path, file, line, what, help_)]) from None
            what = f"importing it raised {type(error).__name__}: {error}".replace(f"{self._package}.", "")
            raise CheckError([self._problem(path, file, line, what)]) from error

    @contextmanager
    def by_bare_names(self) -> Iterator[None]:
        """A block in which everybody finds the modules by their own names, one project at a time.

        So a handler's `load` can read a pickle of the training code's, which names its classes so.
        """
        with _bare_names_lock:
            hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if self._is_another(name)}
            finder = _BareNames(self)
            sys.meta_path.insert(0, finder)
            try:
                yield
            finally:
                sys.meta_path.remove(finder)
                for name in [name for name in finder.lent if name in sys.modules]:
                    del sys.modules[name]
                sys.modules.update(hidden)

    def import_statement(
        self, name: str, namespace: Any = None, local: Any = None, fromlist: Sequence[str] = (), level: int = 0
    ) -> ModuleType:
        """The `__import__` of the project's files, with the signature of `builtins.__import__`.

        A C function that imports, as pickle's does, calls that of the Python code around it, with a list as `fromlist`,
        and wants the module under its own name.
        """
        if isinstance(fromlist, list):
            return builtins.__import__(name, namespace, local, fromlist, level)
        if level:
            package = (namespace or {}).get("__package__") or ""
            if package.count(".") < level <= package.count(".") + 1:  # as where Python finds the file by its own name
                what = f'"from {"." * level}{name} import" leads out of the project: write the name from its root'
                raise ImportError(what)
        elif self._owns_top(top := name.partition(".")[0]):
            full = f"{self._package}.{name}"
            if fromlist:
                return builtins.__import__(full, namespace, local, fromlist, 0)
            importlib.import_module(full)
            return sys.modules[f"{self._package}.{top}"]
        return builtins.__import__(name, namespace, local, fromlist, level)

    def bare(self, name: str) -> ModuleType | None:
        """The project's own module of that absolute name, if it has one."""
        own = self._owns_top(name.partition(".")[0]) and find(self.root, name)
        return importlib.import_module(f"{self._package}.{name}") if own else None

    def spec(self, fullname: str, name: str) -> ModuleSpec | None:
        """How `importlib` imports the module of that absolute name."""
        place = find(self.root, name)
        if place is None:
            return None
        if place.file is None:
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(place.folder)]
            return spec
        known = None if name.partition(".")[0] in FOLDERS else sys.modules.get(name)
        if known is not None and _is_file(known, place.file):
            return ModuleSpec(fullname, _Known(known), is_package=place.folder is not None)
        folders = [str(place.folder)] if place.folder else None
        loader = _FileLoader(fullname, str(place.file), self._sources, self._builtins)
        return spec_from_file_location(fullname, place.file, loader=loader, submodule_search_locations=folders)

    def _owns_top(self, top: str) -> bool:
        if top in NEVER_OWN:
            return False
        owned = self._owns.get(top)
        if owned is None:
            owned = owns(self.root, top)
            if owned or top in sys.modules:  # what is nowhere may still be written
                self._owns[top] = owned
        return owned

    def changed(self) -> bool:
        """Whether the file of an imported module has another content now."""
        return any(_content(file) != content for file, content in self._sources.items())

    def _is_another(self, name: str) -> bool:
        """Whether a module of `sys.modules` has the name of one of the project's, and is another."""
        if not self._owns_top(name.partition(".")[0]):
            return False
        place = find(self.root, name)
        return not (place and place.file and _is_file(sys.modules[name], place.file))

    def _problem(self, path: Path, file: Path, line: int, what: str, help_: str = "") -> Problem:
        """A mistake in a file that the import of `path` read, named as `path` is."""
        root = path
        for _ in self._inside(path).parts:
            root = root.parent
        own = file.is_relative_to(self.root)
        return Problem(str(root / file.relative_to(self.root) if own else file), line, what, help_)

    def _inside(self, path: Path) -> Path:
        """Where in the project a file is, whose folder may be a link."""
        path = path.absolute()
        root = next((folder for folder in path.parents if folder.resolve() == self.root), path.parent.parent)
        return path.relative_to(root)

    def _line_in(self, trace: TracebackType | None) -> tuple[Path, int] | None:
        """The innermost of the project's lines that a traceback has."""
        lines = [(file, line) for file, line in _lines(trace) if file in self._sources]
        return lines[-1] if lines else None


class _Finder(MetaPathFinder):
    """Finds the modules of all projects by their names in `sys.modules`."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 (the signature is Python's)
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        modules = _projects.get(package)
        return modules.spec(fullname, name) if modules and name else None


class _BareNames(MetaPathFinder):
    """Finds one project's modules by their own names, without importing them a second time."""

    def __init__(self, modules: Modules) -> None:
        self.lent: list[str] = []
        self._modules = modules

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 (the signature is Python's)
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        module = self._modules.bare(fullname)
        if module is None or module.__name__ == fullname:
            return None
        self.lent.append(fullname)
        return ModuleSpec(fullname, _Known(module), is_package=hasattr(module, "__path__"))


class _FileLoader(SourceFileLoader):
    """Runs a file with its project's import statement."""

    def __init__(self, fullname: str, path: str, sources: dict[Path, bytes], own_builtins: dict[str, Any]) -> None:
        super().__init__(fullname, path)
        self._sources = sources
        self._builtins = own_builtins

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002 (nothing is cached: the file may change)
        source = self.get_data(self.path)
        self._sources[Path(self.path)] = source
        return self.source_to_code(source, self.path)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = self._builtins
        super().exec_module(module)


class _Known(Loader):
    """Loads nothing: returns a module that is there under another name.

    That the process imported it itself is one case: a test or a notebook that imports a project's classes then has the
    very classes that its workflows use.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:  # noqa: ARG002
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _in(folder: Path, name: str) -> Place | None:
    package, file = folder / name, folder / f"{name}.py"
    if (package / "__init__.py").is_file():
        return Place(package / "__init__.py", package)
    if file.is_file():
        return Place(file, None)
    if package.is_dir() and any(package.rglob("*.py")):
        return Place(None, package)
    return None


def _is_file(module: ModuleType, file: Path) -> bool:
    known = getattr(module, "__file__", None)
    initializing = getattr(module.__spec__, "_initializing", False)
    return known is not None and not initializing and Path(known).resolve() == file.resolve()


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _lines(trace: TracebackType | None) -> Iterator[tuple[Path, int]]:
    while trace:
        yield Path(trace.tb_frame.f_code.co_filename), trace.tb_lineno
        trace = trace.tb_next


def _missed_by(trace: TracebackType | None, file: Path) -> bool:
    """Whether a file's own import statement found nothing, instead of one in a package that it imports."""
    between = (__file__, importlib.__file__)
    files = [one for one, _ in _lines(trace) if not str(one).startswith(("<frozen importlib", *between))]
    return bool(files) and files[-1] == file


_projects: dict[str, Modules] = {}
"""By the name of their package."""
_current: dict[Path, Modules] = {}
"""By their root, as their files are now."""
_finder = _Finder()
