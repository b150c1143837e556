"""Which of a project's own modules its code imports, read from the source: they go into the archive.

Read, not run: a statement inside a function counts too. What only `importlib.import_module` names does not, nor what
only a type checker imports.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePosixPath

from torchserve_dag.runtime.data.source import CheckError, Problem
from torchserve_dag.runtime.project.modules import FOLDERS, NEVER_OWN, find, help_for, name_of, owns, places

_OPTIONAL = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}
"""An import whose failure is caught may fail."""


def own_modules(root: Path, files: Iterable[Path]) -> dict[str, Path]:
    """The modules that the Python files import, they themselves among them, with what those import: name → file.

    Raises CheckError for a module that is nowhere, and for a name that means two modules.
    """
    reader = _Reader(root.resolve(), root)
    for file in sorted(files):
        reader.add(name_of(reader.root, _in_root(root, file)))
    while reader.unread:
        reader.read(*reader.unread.popitem())
    if reader.problems:
        raise CheckError(list(dict.fromkeys(reader.problems)))
    return dict(sorted(reader.modules.items()))


def _in_root(root: Path, file: Path) -> Path:
    """A file of the project below its resolved root. A folder of the project may be a symbolic link."""
    shown, absolute = root.absolute(), file.absolute()
    return root.resolve() / absolute.relative_to(shown) if absolute.is_relative_to(shown) else absolute


def packed(modules: Mapping[str, Path]) -> dict[str, bytes]:
    """The modules by their paths in an archive, where their absolute names find them again.

    A folder without `__init__.py` gets an empty one, so that no installed package of its name comes before it.
    """
    files: dict[str, bytes] = {}
    for name, file in modules.items():
        inside = name.replace(".", "/") + ("/__init__.py" if file.name == "__init__.py" else ".py")
        if name.partition(".")[0] in FOLDERS:
            files[inside] = file.read_bytes()
            continue
        files[f"src/{inside}"] = file.read_bytes()
        for package in PurePosixPath(inside).parents[:-1]:
            files.setdefault(f"src/{package}/__init__.py", b"")
    return files


def digests(modules: Mapping[str, Path]) -> dict[str, str]:
    """The SHA-256 of each module's file, by its name."""
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in modules.items()}


@dataclass
class _Reader:
    root: Path
    """Resolved."""
    shown: Path
    """The root as messages name it."""
    modules: dict[str, Path] = field(default_factory=dict)
    unread: dict[str, Path] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add(self, name: str) -> bool:
        """Add a module with the packages around it. Returns whether it is the project's own."""
        place = find(self.root, name)
        if place is None:
            return False
        outer = name.rpartition(".")[0]
        if outer:
            self.add(outer)
        if place.file and name not in self.modules:
            self.modules[name] = self.unread[name] = place.file
        return True

    def read(self, name: str, file: Path) -> None:
        """Add what a module imports."""
        try:
            tree = ast.parse(file.read_bytes(), str(file))
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None) or 1
            self._problem(file, line, f"not valid Python: {getattr(error, 'msg', error)}")
            return
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for statement, optional in _imports([tree], optional=False):
            if isinstance(statement, ast.Import):
                for alias in statement.names:
                    self._need(file, statement.lineno, alias.name, optional=optional)
                continue
            module = statement.module or ""
            if statement.level:
                parts = package.split(".") if package else []
                if len(parts) < statement.level:
                    what = f'"from {"." * statement.level}{module} import" leads out of the project'
                    self._problem(file, statement.lineno, what, "write the name from the project's root")
                    continue
                module = ".".join([*parts[: len(parts) - statement.level + 1], *([module] if module else [])])
            if self._need(file, statement.lineno, module, optional=optional):
                for alias in statement.names:
                    for inside in self._starred(module) if alias.name == "*" else [alias.name]:
                        self.add(f"{module}.{inside}")  # or else it is a name in the module

    def _need(self, file: Path, line: int, name: str, *, optional: bool) -> bool:
        """An import statement names a module. Returns whether it is the project's own."""
        top = name.partition(".")[0]
        if top in NEVER_OWN:
            hidden = [path for path in (self.root / "src" / f"{top}.py", self.root / f"{top}.py") if path.is_file()]
            if hidden:
                what = f'"import {top}" means Python\'s own module, and {self._shown(hidden[0])} is never imported'
                self._problem(file, line, what, "give the file another name")
            return False
        candidates = places(self.root, top)
        if not owns(self.root, top):
            if not optional and _spec(top) is None:
                self._problem(file, line, f'there is no module "{name}"', help_for(self.root, file, name))
            return False
        first, *others = candidates
        shadowed = [str(self._shown(place.shown)) for place in others if place.file or not first.file]
        shadowed += [
            str(path) for path in _installed(top) if path not in {place.shown.resolve() for place in candidates}
        ]
        if shadowed:
            what = f'"{top}" is {self._shown(first.shown)}, and {shadowed[0]} too'
            help_ = "give the project's own another name; or, if it is installed here, install it with pip install -e"
            self._problem(file, line, what, help_)
        if self.add(name):
            return True
        if not optional:
            self._problem(file, line, f'there is no module "{name}"', help_for(self.root, file, name))
        return False

    def _starred(self, name: str) -> list[str]:
        """The names in a package's `__all__`, which `import *` imports where they are modules."""
        place = find(self.root, name)
        tree = ast.parse(place.file.read_bytes()) if place and place.file and place.folder else ast.Module([], [])
        return [
            name.value
            for statement in tree.body
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.List | ast.Tuple)
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in statement.targets)
            for name in statement.value.elts
            if isinstance(name, ast.Constant) and isinstance(name.value, str)
        ]

    def _shown(self, path: Path) -> Path:
        return self.shown / path.relative_to(self.root)

    def _problem(self, file: Path, line: int, what: str, help_: str = "") -> None:
        self.problems.append(Problem(str(self._shown(file)), line, what, help_))


def _imports(nodes: Iterable[ast.AST], *, optional: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The import statements in and below nodes, and whether each may fail."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, optional
        elif isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING":
            yield from _imports(node.orelse, optional=optional)
        elif isinstance(node, ast.Try):
            caught = any(handler.type is None or _catches(handler.type) for handler in node.handlers)
            yield from _imports(node.body, optional=optional or caught)
            yield from _imports([*node.handlers, *node.orelse, *node.finalbody], optional=optional)
        elif isinstance(node, ast.With):
            calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
            caught = any(_name(call.func) == "suppress" and any(map(_catches, call.args)) for call in calls)
            yield from _imports(node.body, optional=optional or caught)
        else:
            yield from _imports(ast.iter_child_nodes(node), optional=optional)


def _name(node: ast.expr) -> str:
    """A name, or the last part of a dotted one."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _catches(kinds: ast.expr) -> bool:
    """Whether these exceptions are what the failure of an import raises."""
    return any(_name(kind) in _OPTIONAL for kind in (kinds.elts if isinstance(kinds, ast.Tuple) else [kinds]))


def _installed(top: str) -> list[Path]:
    """The file of an installed module, also where the project is on Python's path."""
    spec = _spec(top)
    return [Path(spec.origin).resolve()] if spec and spec.has_location and spec.origin else []


def _spec(top: str) -> ModuleSpec | None:
    """Where Python finds a module that is not of its own, without importing it."""
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):  # it is being imported, or a program is
        return None
