"""TorchServe's own workflows (`models:` and `dag:`), as a file or a finished `.war`, read into the same graph as ours.

Its rules, from TorchServe 0.12.0: a name in `dag` is a model of `models` or a function of the workflow's Python
file; exactly one node has no parent; a node with one parent gets its answer as `body`, a node with several gets each
answer under its parent's name; the answers of several leaves become one JSON object. Every node sees the client's
headers.
"""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from torchserve_dag.runtime.compat import archive as archives
from torchserve_dag.runtime.compat.functions import check_functions
from torchserve_dag.runtime.compat.process import ProcessError
from torchserve_dag.runtime.data import plain, source
from torchserve_dag.runtime.data.source import CheckError, Problem, Source
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.graph.kinds import Kind
from torchserve_dag.runtime.graph.torchserve.kinds import ArchiveCode, RowsFunctionCode
from torchserve_dag.runtime.graph.torchserve.nodes import Step, longest, make_nodes
from torchserve_dag.runtime.graph.torchserve.war import read_war
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.project.handler_file import Serve

_NUMBERS = {
    "min-workers": 1,
    "max-workers": 1,
    "batch-size": 1,
    "max-batch-delay": 50,
    "retry-attempts": 1,
    "timeout-ms": 10_000,
}
"""The settings of a model, and TorchServe's defaults."""

_JAVA_INT = range(-(2**31), 2**31)
_DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class _Model:
    url: Any
    numbers: Mapping[str, int]


def is_torchserve_file(path: Path) -> bool:
    """Whether a workflow file is in TorchServe's own form."""
    if path.suffix == ".war":
        return True
    data, _ = source.read_plain(path)
    return isinstance(data, dict) and "dag" in data


def check_torchserve_file(project: Project, path: Path) -> Graph:
    """The graph of TorchServe's workflow at `path`, a YAML file or a `.war`. Raises CheckError."""
    return _Check(project, path).graph()


class _Check:
    def __init__(self, project: Project, path: Path) -> None:
        self.project = project
        self.path = path
        self.war = read_war(path) if path.suffix == ".war" else None
        spec = self.war.spec if self.war else path
        try:
            data, lines = source.read_plain(spec)
        except CheckError as error:
            raise CheckError([replace(problem, file=str(self._shown(spec))) for problem in error.problems]) from None
        self.source = Source(self._shown(spec), data, lines)
        self.problems: list[Problem] = []

    def _shown(self, file: Path) -> Path:
        """A file's path in messages: inside the `.war`, not where that was unpacked."""
        return self.path / file.name if self.war else file

    def _problem(self, path: plain.Path, what: str, help: str = "") -> None:  # noqa: A002
        self.problems.append(self.source.problem(path, what, help))

    def _problem_in(self, file: Path, line: int | None, what: str, help: str = "") -> None:  # noqa: A002
        self.problems.append(Problem(str(self._shown(file)), line or 1, what, help))

    def _stop(self) -> None:
        if self.problems:
            raise CheckError(self.problems)

    def graph(self) -> Graph:
        models, last = self._models()
        parents = self._parents()
        self._stop()
        functions = [name for name in parents if name not in models]
        file = self._functions_file(functions) if functions else None
        self._stop()
        if file:
            self._check_functions(functions, file)
        steps: dict[str, Step] = {}
        for name, before in parents.items():
            model = models.get(name)
            archive = self._archive(name, model.url) if model else None
            kind: Kind | None = ArchiveCode(archive) if archive else RowsFunctionCode(file, name) if file else None
            numbers = model.numbers if model else {**last, "batch-size": 1, "max-workers": 1}
            self._check_numbers(name, numbers, ("models", name) if model else ("models",))
            if kind:
                steps[name] = _step(before, kind, numbers)
        self._stop()
        nodes, output = make_nodes(steps)
        return Graph(
            self.path.stem,
            "1.0",
            "A workflow in TorchServe's own form.",
            self.path,
            None if self.war else file,
            Any,
            nodes,
            output,
            Serve(timeout_s=min(_DAY_S, math.ceil(longest(steps)))),
        )

    # The section `models`.

    def _models(self) -> tuple[dict[str, _Model], dict[str, int]]:
        """The models, and the settings of all functions: those that are written last."""
        section = self.source.value.get("models") if isinstance(self.source.value, dict) else None
        now, models = dict(_NUMBERS), {}
        if not isinstance(section, dict):
            self._problem(("models",), "models: expected a mapping", "write models: {} where there are none")
            return {}, now
        for name, settings in section.items():
            where = ("models", name)
            if name in _NUMBERS:  # this setting holds for the models below it
                if self._is_number(where, "models", settings):
                    now[name] = settings
            elif not isinstance(settings, dict):
                known = [*_NUMBERS, "a model's name over its settings"]
                self._problem(where, f'models: unknown key "{name}"', plain.did_you_mean(str(name), known))
            elif not isinstance(name, str):
                self._problem(where, f"models: the key {name} is not text", "put it in quotes")
            else:
                models[name] = self._model(name, settings, now)
        return models, now

    def _model(self, name: str, settings: dict[Any, Any], now: Mapping[str, int]) -> _Model:
        numbers = dict(now)
        for key, value in settings.items():
            where = ("models", name, key)
            if key in _NUMBERS:
                if self._is_number(where, name, value):
                    numbers[key] = value
            elif key != "url" and (close := difflib.get_close_matches(str(key), [*_NUMBERS, "url"], 1, 0.8)):
                # TorchServe ignores keys that it does not know, so a misspelt setting would have no effect.
                self._problem(where, f'{name}: unknown key "{key}"', f'did you mean "{close[0]}"?')
        return _Model(settings.get("url"), numbers)

    def _is_number(self, where: plain.Path, called: str, value: Any) -> bool:
        if type(value) is int and value in _JAVA_INT:
            return True
        self._problem(where, f"{called}: expected a whole number, not {value!r}")
        return False

    def _check_numbers(self, name: str, numbers: Mapping[str, int], where: plain.Path) -> None:
        for key in ("max-workers", "timeout-ms"):
            if numbers[key] < 1:  # TorchServe accepts it, and then every call fails
                self._problem((*where, key), f"{name}: {key} is at least 1, or no call could be answered")

    def _archive(self, name: str, url: Any) -> Path | None:
        where = ("models", name, "url")
        if not isinstance(url, str) or not url:
            self._problem(where, f'{name}: "url" is missing' if url is None else f"{name}: url: expected text")
            return None
        if "://" in url:
            self._problem(where, f"{name}: {url} is an address", "put the archive into model_store/ and write its name")
            return None
        file = Path(url).name  # like TorchServe, which ignores the rest of the path …
        folders = (self.path.parent, self.project.root / "model_store", self.project.root)
        archive = next((path for folder in folders if (path := folder / file).exists()), None)
        if archive is None or ".." in url:  # … but for this
            self._problem(where, f"{name}: there is no archive {url} in model_store/ or beside this file")
            return None
        if not archives.handler_of(archive):
            self._problem(where, f"{name}: {archive} is not an archive of torch-model-archiver's")
            return None
        if archives.streams(archive):
            help_ = "a workflow in our own form streams it: docs/workflows/torchserve-handlers.md"
            self._problem(where, f"{name}: {url} sends its answer in chunks, and this form knows no streams", help_)
            return None
        return archive

    # The section `dag`.

    def _parents(self) -> dict[str, list[str]]:
        """Each node's parents, in the order in which they are written."""
        dag = self.source.value.get("dag") if isinstance(self.source.value, dict) else None
        if not isinstance(dag, dict) or not dag:
            self._problem(("dag",), "dag: expected a mapping from each node to the list of those after it")
            return {}
        before = len(self.problems)
        parents: dict[str, list[str]] = {}
        for name, after in dag.items():
            if not isinstance(name, str):
                self._problem(("dag", name), f"dag: the key {name} is not text", "put it in quotes")
                continue
            parents.setdefault(name, [])
            if not isinstance(after, list):
                self._problem(("dag", name), f"dag: {name}: expected a list of nodes")
                continue
            for i, child in enumerate(after):
                if child is None or not str(child).strip():
                    continue
                if not isinstance(child, str):
                    self._problem(("dag", name, i), f"dag: {name}: {child} is not text", "put it in quotes")
                elif name in parents.setdefault(child, []):
                    self._problem(("dag", name, i), f"dag: {name}: {child} is written twice", "keep one")
                else:
                    parents[child].append(name)
        return {} if len(self.problems) > before else self._ordered(parents)

    def _ordered(self, parents: dict[str, list[str]]) -> dict[str, list[str]]:
        """`parents` in an order in which each node comes after its parents."""
        try:
            order = list(TopologicalSorter(parents).static_order())
        except CycleError as error:
            self._problem(("dag", error.args[1][0]), f"dag: a cycle: {' -> '.join(reversed(error.args[1]))}")
            return {}
        starts = [name for name in order if not parents[name]]
        if len(starts) != 1:
            self._problem(
                ("dag", starts[1]),
                f"dag: {len(starts)} nodes have no parent: {', '.join(starts)}",
                "put one node before them all",
            )
        return {name: parents[name] for name in order}

    def _place(self, name: str) -> plain.Path:
        """The first place in the dag that names a node."""
        for parent, after in self.source.value["dag"].items():
            if parent == name:
                break
            if name in after:
                return ("dag", parent, after.index(name))
        return ("dag", name)

    # The workflow's Python file.

    def _functions_file(self, functions: list[str]) -> Path | None:
        """The file of a `.war`; else NAME_handler.py or NAME.py, or the one file here that defines them all."""
        if self.war:
            return self.war.functions
        folder, name = self.path.parent, self.path.stem
        usual = [folder / f"{name}_handler.py", folder / f"{name}.py"]
        files = [path for path in usual if path.is_file()][:1]
        files = files or [path for path in sorted(folder.glob("*.py")) if _defined(path) >= {*functions}]
        if len(files) == 1:
            return files[0]
        what = f"dag: {', '.join(functions)}: not in models, and "
        if files:
            what += f"{' and '.join(path.name for path in files)} all define them"
            self._problem(self._place(functions[0]), what, f"give the one that is meant the name {usual[0].name}")
        else:
            what += f"there is no {usual[0].name}, nor another Python file here that defines them"
            help_ = "write the functions there, or the models under models"
            self._problem(self._place(functions[0]), what, help_)
        return None

    def _check_functions(self, functions: list[str], file: Path) -> None:
        try:
            found = check_functions(file, functions)
        except ProcessError as error:
            self._problem_in(file, None, f"it cannot be imported: {error}")
            return
        if found.what:
            help_ = "its other files go with it in a .war, as torch-workflow-archiver makes it"
            self._problem_in(file, found.line, found.what, help_ if found.needs_a_file and not self.war else "")
        for name in found.missing:
            self._problem(self._place(name), f'dag: "{name}" is neither in models nor a function of {file.name}')


def _step(parents: list[str], kind: Kind, numbers: Mapping[str, int]) -> Step:
    retries, timeout_s = max(0, numbers["retry-attempts"]), numbers["timeout-ms"] / 1000
    return Step(parents, kind, max(1, numbers["batch-size"]), retries, timeout_s)


def _defined(file: Path) -> set[str]:
    """The names that a Python file defines, as far as its syntax tree tells."""
    try:
        tree = ast.parse(file.read_text("utf-8"))
    except (OSError, ValueError, SyntaxError):
        return set()
    names: set[str] = set()
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef):
            names.add(statement.name)
        elif isinstance(statement, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in statement.names}
        elif isinstance(statement, ast.Assign):
            names |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return names
