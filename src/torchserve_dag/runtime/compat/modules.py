"""A folder's Python files as modules that import each other by their bare names, isolated from other folders'.

TorchServe gives each model a process of its own, with the model's folder on the path. Here many models share a
process, and each may have a `model.py`. So each folder is a package with a name of its own, and an import
statement in one of its files looks into the folder first, whenever it runs and in whatever thread.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import itertools
import os
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

_PACKAGE = "torchserve_dag_folder_"
_numbers = itertools.count()
_loading = threading.RLock()

# As in TorchServe's worker, these modules are imported already: a model does not get its own files of these names.
_NEVER_OWN = {*sys.stdlib_module_names, "numpy", "PIL", "torch", "torchserve_dag", "ts", "yaml"}


class FolderModules:
    """The modules of one folder. They stay until `close`."""

    def __init__(self, folder: Path, only: Collection[str] | None = None) -> None:
        """`only`: the names of the files that are modules; without it, all files."""
        self.folder = folder = folder.absolute()  # a module may be loaded in another working directory
        self._package = f"{_PACKAGE}{next(_numbers)}"
        own = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/*.py")}
        self._own = frozenset((own if only is None else own & set(only)) - _NEVER_OWN)
        package = ModuleType(self._package)
        package.__path__ = [str(folder)]
        sys.modules[self._package] = package
        _folders[self._package] = self
        if _full_names not in sys.meta_path:
            sys.meta_path.insert(0, _full_names)
        importlib.invalidate_caches()

    def __contains__(self, name: str) -> bool:
        return name in self._own

    def module(self, name: str) -> ModuleType:
        """The module of a file, by its name without `.py`. Raises whatever importing it raises."""
        return importlib.import_module(f"{self._package}.{name}")

    def import_statement(
        self, name: str, namespace: Any = None, local: Any = None, fromlist: Sequence[str] = (), level: int = 0
    ) -> ModuleType:
        """The `__import__` of the folder's files, with the signature of `builtins.__import__`."""
        top = name.partition(".")[0]
        if level or top not in self._own:
            return builtins.__import__(name, namespace, local, fromlist, level)
        if fromlist:
            return builtins.__import__(f"{self._package}.{name}", namespace, local, fromlist, 0)
        self.module(name)
        return self.module(top)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """The environment in which a handler loads, as in TorchServe's worker: `importlib` and `pickle`, too, find the
        files by their bare names, and the folder is the working directory. One folder at a time.
        """
        with _loading:
            hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in self._own}
            before, finder = Path.cwd(), _BareNames(self)
            sys.meta_path.insert(0, finder)
            os.chdir(self.folder)
            try:
                yield
            finally:
                os.chdir(before)
                sys.meta_path.remove(finder)
                for name in [name for name in list(sys.modules) if name.partition(".")[0] in self._own]:
                    del sys.modules[name]
                sys.modules.update(hidden)

    def close(self) -> None:
        _folders.pop(self._package, None)
        for name in [name for name in list(sys.modules) if name.partition(".")[0] == self._package]:
            del sys.modules[name]


class _FullNames(MetaPathFinder):
    """Finds the modules of all folders by their full names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = _folders.get(fullname.partition(".")[0])
        spec = PathFinder.find_spec(fullname, path, target) if folder else None
        if folder and spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _FileLoader(fullname, spec.loader.path, folder)
        return spec


class _FileLoader(SourceFileLoader):
    """Runs a file with the folder's own import statement."""

    def __init__(self, fullname: str, path: str, folder: FolderModules) -> None:
        super().__init__(fullname, path)
        self._folder = folder

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002 (nothing is cached: the file may change)
        return self.source_to_code(self.get_data(self.path), self.path)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._folder.import_statement}
        super().exec_module(module)


class _BareNames(MetaPathFinder):
    """Finds one folder's modules by their bare names, without loading them a second time."""

    def __init__(self, folder: FolderModules) -> None:
        self._folder = folder

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 (the signature is Python's)
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self._folder:
            return None
        return spec_from_loader(fullname, _Known(self._folder.module(fullname)))


class _Known(Loader):
    """Loads nothing: returns a module that has been imported under another name."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:  # noqa: ARG002
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


_folders: dict[str, FolderModules] = {}
"""By the name of their package."""
_full_names = _FullNames()
