"""Which module of the package imports which, read from the source: for the rules and for the picture.

A room is a folder below `src/torchserve_dag/`, and below `runtime/` each folder again; a module that lies loose in
either is a room of its own. By hand: `python -m tests.imports [SRC]` prints the rooms, the arrows and the circles.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

SRC = Path(__file__).parent.parent / "src" / "torchserve_dag"
PACKAGE = "torchserve_dag"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("commands",),
    ("bench", "dev", "evaluation", "stack", "tuning"),
    ("gateway", "releases", "retrieval"),
    ("front_door",),
    ("server", "templates"),
    ("__init__",),
    ("archives",),
    ("clients", "direct", "pictures"),
    ("runtime/worker",),
    ("runtime/workflow",),
    ("runtime/models", "runtime/telemetry"),
    ("runtime/engine",),
    ("runtime/graph", "runtime/retrieval"),
    ("runtime/compat", "runtime/project"),
    ("runtime/data", "runtime/handler"),
    ("runtime/compute", "runtime/logs", "runtime/messages", "runtime/protos"),
)
"""The rooms from the top down: a room imports from the floors below its own only."""


@dataclass(frozen=True, slots=True)
class Import:
    """One module that another one imports."""

    module: str
    """Who imports, by its dotted name."""
    imported: str
    """A module of the package by its dotted name, or the top name of another package."""
    line: int
    lazy: bool
    """Whether it is imported inside a function, or named in a string that is run with `-m`."""
    typing: bool
    """Whether only a type checker imports it."""

    @property
    def inside(self) -> bool:
        """Whether what is imported belongs to the package."""
        return self.imported.partition(".")[0] == PACKAGE

    @property
    def third_party(self) -> bool:
        return not self.inside and self.imported not in sys.stdlib_module_names


class Imports:
    """All imports of a source folder."""

    def __init__(self, src: Path = SRC) -> None:
        self.modules = {_name(src, path): path for path in sorted(src.rglob("*.py"))}
        self.all = [found for module, path in self.modules.items() for found in _read(module, path, self.modules)]

    @cached_property
    def rooms(self) -> set[str]:
        """Every room; the empty `__init__.py` of `runtime/` is none."""
        return {room(name) for name in self.modules} - {"runtime/__init__"}

    @cached_property
    def arrows(self) -> dict[tuple[str, str], list[Import]]:
        """From room to room, each with the imports that it stands for."""
        arrows: dict[tuple[str, str], list[Import]] = {}
        for found in self.all:
            if found.inside and room(found.imported) in self.rooms - {room(found.module)}:
                arrows.setdefault((room(found.module), room(found.imported)), []).append(found)
        return dict(sorted(arrows.items()))

    @cached_property
    def upwards(self) -> list[Import]:
        """The imports of a room that does not lie on a lower floor."""
        floor = {name: i for i, names in enumerate(FLOORS) for name in names}
        return [found for (a, b), arrow in self.arrows.items() if floor[b] <= floor[a] for found in arrow]

    def circle(self, *, of_rooms: bool = False) -> list[str]:
        """One circle of modules (or of rooms) that import each other, as a path that ends where it began."""
        if of_rooms:
            return circle({name: {b for a, b in self.arrows if a == name} for name in self.rooms})
        needs: dict[str, set[str]] = {name: set() for name in self.modules}
        for found in self.all:
            if found.inside and found.imported not in {PACKAGE, found.module}:  # `__init__.py` is there for everybody
                needs[found.module].add(found.imported)
        return circle(needs)

    def of(self, room_or_folder: str) -> list[Import]:
        """What the modules of a room import, or of all rooms below a folder."""
        return [found for found in self.all if f"{room(found.module)}/".startswith(f"{room_or_folder}/")]


def circle(needs: Mapping[str, Collection[str]]) -> list[str]:
    """A path through `needs` that ends where it began; empty where there is none."""
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def room(module: str) -> str:
    """The room of a module, `runtime/engine` for example, or `__init__` for the package's own file."""
    parts = module.split(".")[1:]
    if parts[:1] == ["runtime"]:
        return "/".join(parts[:2]) if len(parts) > 1 else "runtime/__init__"
    return parts[0] if parts else "__init__"


def _name(src: Path, path: Path) -> str:
    parts = [PACKAGE, *path.relative_to(src).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read(module: str, path: Path, modules: Collection[str]) -> Iterator[Import]:
    yield from _walk(ast.parse(path.read_text("utf-8")), module, modules, lazy=False, typing=False)


def _walk(node: ast.AST, module: str, modules: Collection[str], *, lazy: bool, typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield _import(module, alias.name, child.lineno, modules, lazy=lazy, typing=typing)
        elif isinstance(child, ast.ImportFrom):
            parts = module.split(".")[: -child.level] if child.level else []  # only generated code says `from .`
            source = ".".join([*parts, child.module] if child.module else parts)
            for alias in child.names:
                full = f"{source}.{alias.name}"
                name = full if full in modules else source
                yield _import(module, name, child.lineno, modules, lazy=lazy, typing=typing)
        elif isinstance(child, ast.Constant) and isinstance(child.value, str) and child.value in modules:
            if child.value != PACKAGE:  # which is the name of the program too
                yield Import(module, child.value, child.lineno, lazy=True, typing=False)
        elif isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            yield from _walk(child, module, modules, lazy=lazy, typing=True)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, module, modules, lazy=lazy or function, typing=typing)


def _import(module: str, name: str, line: int, modules: Collection[str], *, lazy: bool, typing: bool) -> Import:
    inside = name.partition(".")[0] == PACKAGE
    while inside and name not in modules:
        name = name.rpartition(".")[0]
    return Import(module, name if inside else name.partition(".")[0], line, lazy, typing)


def report(imports: Imports) -> Iterator[str]:
    yield f"{len(imports.rooms)} rooms, {len(imports.arrows)} arrows between rooms"
    yield f"circle of modules: {' → '.join(imports.circle()) or 'none'}"
    yield f"circle of rooms: {' → '.join(imports.circle(of_rooms=True)) or 'none'}"
    if unknown := imports.rooms - {name for names in FLOORS for name in names}:
        yield f"rooms on no floor: {', '.join(sorted(unknown))}"
    else:
        yield f"{len(imports.upwards)} imports upwards"
        yield from (f"  {found.module}:{found.line} imports {found.imported}" for found in imports.upwards)
    yield from (f"  {a} → {b}  ({len(arrow)})" for (a, b), arrow in imports.arrows.items())


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in report(Imports(Path(sys.argv[1]) if len(sys.argv) > 1 else SRC)))
