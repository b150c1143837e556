"""TorchServe's own workflow file (`models:` and `dag:`), read into the same graph as ours.

Its rules, from TorchServe 0.12.0: a name in `dag` is a model of `models` or a function of the workflow's
Python file; exactly one node has no parent; a node with one parent gets its result as `body`, one with
several gets each under its parent's name; what several leaves give is one JSON object.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from http import HTTPStatus
from pathlib import Path
from typing import Any

from torchserve_dag import plain, source
from torchserve_dag.engine.expression import Expression
from torchserve_dag.engine.graph import REQUEST, Graph, Node, RowsCode
from torchserve_dag.handler_file import Serve
from torchserve_dag.messages import Failure
from torchserve_dag.project import Project, import_file
from torchserve_dag.source import CheckError, Problem, Source

ANSWER = "answer"
_RESERVED = (REQUEST, "parameters")


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """A model's settings in a TorchServe workflow, under their names there with `-` for `_`."""

    url: str
    min_workers: int = 1
    max_workers: int = 1
    batch_size: int = 1
    max_batch_delay: int = 50
    retry_attempts: int = 1
    timeout_ms: int = 10_000

    def __post_init__(self) -> None:
        if min(self.min_workers, self.max_workers, self.batch_size, self.timeout_ms) < 1:
            raise ValueError("min-workers, max-workers, batch-size and timeout-ms are at least 1")


def is_torchserve_file(path: Path) -> bool:
    """Whether a workflow file is written in TorchServe's own form."""
    data, _ = source.read_plain(path)
    return isinstance(data, dict) and "dag" in data


def check_torchserve_file(project: Project, path: Path) -> Graph:
    """The graph of TorchServe's workflow file at `path`. Raises CheckError."""
    return _Check(project, path).graph()


class _Check:
    def __init__(self, project: Project, path: Path) -> None:
        data, lines = source.read_plain(path)
        self.project = project
        self.source = Source(path, data, lines)
        self.problems: list[Problem] = []

    def _problem(self, path: plain.Path, what: str, help: str = "") -> None:  # noqa: A002
        self.problems.append(self.source.problem(path, what, help))

    def _stop(self) -> None:
        if self.problems:
            raise CheckError(self.problems)

    def graph(self) -> Graph:
        models, defaults = self._models()
        parents = self._parents()
        self._stop()
        functions_path = self._functions_path(models, parents)
        self._stop()
        nodes = self._nodes(models, defaults, parents, functions_path)
        self._stop()
        leaves = [name for name in parents if not any(name in others for others in parents.values())]
        output = leaves[0]
        if len(leaves) > 1:
            output = next(name for name in _answer_names() if name not in nodes)
            nodes[output] = _joined(output, leaves, 1 + max(nodes[leaf].depth for leaf in leaves))
        timeout = max([models[n].timeout_ms for n in parents if n in models], default=defaults["timeout_ms"])
        return Graph(
            self.source.path.stem,
            "1.0",
            "A workflow in TorchServe's own form.",
            self.source.path,
            functions_path,
            Any,
            nodes,
            output,
            Serve(timeout_s=max(1, timeout // 1000) * len(parents)),
        )

    def _models(self) -> tuple[dict[str, ModelSettings], dict[str, Any]]:
        section = self.source.value.get("models", {})
        if not isinstance(section, dict):
            self._problem(("models",), "models: expected a mapping")
            return {}, {}
        keys = {f.replace("_", "-"): f for f in plain.field_types(ModelSettings) if f != "url"}
        shared = {keys[k]: v for k, v in section.items() if k in keys}
        try:
            defaults = plain.flatten(plain.build(ModelSettings, {**shared, "url": ""}))
        except plain.WrongDataError as error:
            for wrong in error.wrongs:
                self._problem(("models", *_as_written(wrong.path)), f"models: {wrong.what}", wrong.help)
            return {}, {}
        models = {}
        for name, settings in section.items():
            if name in keys:
                continue
            if not isinstance(settings, dict):
                known = [*keys, "a model's name over its settings"]
                self._problem(("models", name), f'models: unknown key "{name}"', plain.did_you_mean(name, known))
                continue
            try:
                renamed = {keys.get(k, k): v for k, v in settings.items()}
                models[name] = plain.build(ModelSettings, {**shared, **renamed})
            except plain.WrongDataError as error:
                for wrong in error.wrongs:
                    place = ("models", name, *_as_written(wrong.path))
                    self._problem(place, f"{name}: {wrong.what}", wrong.help.replace("_", "-"))
        return models, defaults

    def _parents(self) -> dict[str, list[str]]:
        """Each node's parents, in the order in which they are written."""
        dag = self.source.value["dag"]
        if not isinstance(dag, dict) or not dag:
            self._problem(("dag",), "dag: expected a mapping from each node to the list of those after it")
            return {}
        parents: dict[str, list[str]] = {}
        for name, after in dag.items():
            if not isinstance(name, str):
                self._problem(("dag", name), f"dag: the key {name} is not text", "put it in quotes")
                continue
            parents.setdefault(name, [])
            if not isinstance(after, list):
                self._problem(("dag", name), f"dag: {name}: expected a list of nodes")
                continue
            for child in after:
                if child and str(child).strip() and name not in (before := parents.setdefault(str(child), [])):
                    before.append(name)
        for name in _RESERVED:
            if name in parents:
                self._problem(self._place(name), f'dag: a node cannot be called "{name}"', "rename it")
        return {} if self.problems else self._ordered(parents)

    def _ordered(self, parents: dict[str, list[str]]) -> dict[str, list[str]]:
        """The same, each node after its parents."""
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
        """Where the dag names a node first."""
        for parent, after in self.source.value["dag"].items():
            if parent == name:
                break
            if isinstance(after, list) and name in after:
                return ("dag", parent, after.index(name))
        return ("dag", name)

    def _functions_path(self, models: dict[str, ModelSettings], parents: dict[str, list[str]]) -> Path | None:
        functions = [name for name in parents if name not in models]
        if not functions:
            return None
        stem = self.source.path.with_suffix("")
        tried = [stem.with_name(f"{stem.name}_handler.py"), stem.with_suffix(".py")]
        found = next((path for path in tried if path.is_file()), None)
        if found is None:
            names = ", ".join(functions)
            self._problem(
                self._place(functions[0]),
                f"dag: {names}: not in models, and there is no {tried[0].name}",
                "write the functions there, or the models under models",
            )
        return found

    def _nodes(
        self,
        models: dict[str, ModelSettings],
        defaults: dict[str, Any],
        parents: dict[str, list[str]],
        functions_path: Path | None,
    ) -> dict[str, Node]:
        nodes: dict[str, Node] = {}
        for name, before in parents.items():
            settings = models.get(name)
            archive = self._archive(name, settings.url) if settings else None
            function = None if settings else self._function(name, functions_path)
            needs = before or [REQUEST]
            keys = [("body", needs[0])] if len(needs) == 1 else [(need, need) for need in needs]
            nodes[name] = Node(
                name=name,
                takes={key: _read(need) for key, need in keys},
                each=None,
                when=None,
                sees_skipped=frozenset(),
                result=Any,
                needs=frozenset(needs),
                depth=1 + max((nodes[b].depth for b in before if b in nodes), default=0),
                rows=RowsCode(archive, function, settings.retry_attempts if settings else defaults["retry_attempts"]),
                batch=settings.batch_size if settings else 1,
            )
        return nodes

    def _archive(self, name: str, url: str) -> Path | None:
        where = ("models", name, "url")
        if "://" in url:
            self._problem(where, f"{name}: {url} is an address", "put the archive into model_store/ and write its name")
            return None
        folders = (self.source.path.parent, self.project.root / "model_store", self.project.root)
        found = next((path for folder in folders if (path := folder / url).is_file()), None)
        if found is None:
            self._problem(where, f"{name}: there is no archive {url} in model_store/ or beside this file")
        return found

    def _function(self, name: str, path: Path | None) -> Callable[..., Any] | None:
        if path is None:
            return None
        try:
            function = getattr(import_file(path), name, None)
        except CheckError as error:
            self.problems += [p for p in error.problems if p not in self.problems]
            return None
        if not inspect.isfunction(function):
            self._problem(self._place(name), f'dag: "{name}" is neither in models nor a function of {path.name}')
            return None
        return function


def _read(name: str) -> Expression:
    # Names in such a file may have hyphens, which an expression would read as minus.
    return Expression(name, Any, frozenset({name}), lambda values: values[name])


def _as_written(path: plain.Path) -> plain.Path:
    return tuple(str(part).replace("_", "-") for part in path)


def _answer_names() -> Iterator[str]:
    return (ANSWER + "_" * i for i in itertools.count())


def _joined(name: str, leaves: list[str], depth: int) -> Node:
    def answer(**results: bytes) -> Any:
        found: dict[str, Any] = {}
        for leaf in leaves:
            try:
                found[leaf] = json.loads(results[leaf])
            except ValueError:
                found[leaf] = None
            if not isinstance(found[leaf], dict):
                message = f"{leaf} must give a JSON object, since the workflow has several leaves."
                return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, message, "HandlerError")
        return found

    return Node(
        name=name,
        takes={leaf: _read(leaf) for leaf in leaves},
        each=None,
        when=None,
        sees_skipped=frozenset(),
        result=dict[str, Any],
        needs=frozenset(leaves),
        depth=depth,
        function=answer,
    )
