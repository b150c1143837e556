"""`torchserve-dag check`: what is wrong with handlers and workflows, before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from torchserve_dag.commands.common import (
    JsonOption,
    ProjectOption,
    count,
    failures,
    out,
    print_json,
    print_left_out,
    print_problems,
    project_root,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchserve_dag.runtime.data.source import Problem
    from torchserve_dag.runtime.graph.graph import Graph
    from torchserve_dag.runtime.project.folders import Project


def _settings_problems(root: Path, good: set[tuple[str, str]]) -> list[Problem]:
    """The problems in the files at the project's root. They may name versions that only the model store has."""
    from torchserve_dag.archives.archive import read_store
    from torchserve_dag.runtime.data.source import CheckError
    from torchserve_dag.server import config_keys, properties
    from torchserve_dag.stack import settings

    store = read_store(root / "model_store")
    problems = settings.releases_problems(root, store) + config_keys.problems(properties.find(root))
    try:
        settings.read(root, good | store.archives.keys())
    except CheckError as error:
        problems += error.problems
    return problems


def _overlooked(project: Project, graphs: Iterable[Graph]) -> list[Problem]:
    """Problems for files in handlers/ and workflows/ that look as if they were served, but are not read."""
    from torchserve_dag.archives.contents import sources
    from torchserve_dag.archives.imports import own_modules
    from torchserve_dag.runtime.data.source import CheckError, Problem, read_plain

    problems = []
    for folder in ("handlers", "workflows"):
        for path in sorted((project.root / folder).glob("*")):
            if path.suffix == ".yml":
                problems.append(Problem(str(path), 1, "a file that ends in .yml is not read", "let it end in .yaml"))
            elif path.suffix == ".yaml" and path.name.startswith("."):
                help_ = f"call it {path.name.lstrip('.')}, or delete it"
                problems.append(Problem(str(path), 1, "a hidden file is not read", help_))
    imported = {path for graph in graphs for path in own_modules(project.root, sources(graph)).values()}
    codes = {path.name for path in imported if path.parent == project.root.resolve() / "handlers"}
    for path in project.files("handlers"):
        try:
            data, _ = read_plain(path)
        except CheckError:  # it is named already
            data = None
        fields = data if isinstance(data, dict) else {}
        codes.add(str(fields.get("code") or f"{fields.get('name') or path.stem}.py"))
    for path in sorted((project.root / "handlers").glob("[!.]*.py")):
        if path.name not in codes | {"__init__.py"}:
            help_ = f"write its name, version and card into {path.with_suffix('.yaml')}"
            problems.append(Problem(str(path), 1, "no .yaml names this handler, so it is not built", help_))
    return problems


def check(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME[/VERSION]", help="What to check; by default all.")
    ] = None,
    *,
    json: JsonOption = False,
    project: ProjectOption = None,
) -> None:
    """Check handlers and workflows for whatever `build` refuses, and the project's settings."""
    from torchserve_dag.archives.build import check as check_all
    from torchserve_dag.runtime.data import plain
    from torchserve_dag.runtime.project.folders import Project

    with failures():
        of = Project(project_root(project))
        checked, report = check_all(of, names or [])
        problems = report.problems
        good = [
            {
                "kind": one.target.folder.removesuffix("s"),
                "name": one.target.name,
                "version": one.target.version,
                "file": str(one.target.file.path),
                "takes": plain.name_of(one.graph.request),
                "answers": plain.name_of(one.graph.answer),
            }
            for one in checked
        ]
        if not names:
            problems += _overlooked(of, [one.graph for one in checked])
            problems += _settings_problems(of.root, {(one["name"], one["version"]) for one in good})
    if json:
        print_json({"checked": good, "left_out": report.left_out, "problems": problems})
    else:
        for one in good:
            what = f"{one['name']} {one['version']}: {one['takes']} -> {one['answers']}"
            out.print(f"[green]ok[/] {one['kind']:8} {escape(what)}")
        print_left_out(report.left_out)
        print_problems(problems)
        out.print(f"{len(good)} in order, {count(len(problems), 'problem')}")
    raise typer.Exit(1 if problems else 0)
