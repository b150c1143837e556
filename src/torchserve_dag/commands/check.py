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
    print_problems,
    project_root,
)

if TYPE_CHECKING:
    from torchserve_dag.runtime.data.source import Problem


def _served_problems(root: Path, good: set[tuple[str, str]]) -> list[Problem]:
    """What is wrong with the files of the front door; a version may be in the model store alone."""
    from torchserve_dag.archives import mar
    from torchserve_dag.front_door import settings
    from torchserve_dag.runtime.data.source import CheckError
    from torchserve_dag.stack.start import known_versions, read_routes

    archives = dict.fromkeys(good, "") | {one: path.name for one, path in mar.versions_in(root / "model_store").items()}
    problems = []
    for read in (lambda: read_routes(root, known_versions(archives)), lambda: settings.read(root)):
        try:
            read()
        except CheckError as error:
            problems += error.problems
    return problems


def check(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME[/VERSION]", help="All unless given.")] = None,
    *,
    json: JsonOption = False,
    project: ProjectOption = None,
) -> None:
    """Check handlers and workflows: names, types along every edge, settings, cards; and the front door's files."""
    from torchserve_dag.archives.build import targets
    from torchserve_dag.runtime.data import plain
    from torchserve_dag.runtime.data.source import CheckError
    from torchserve_dag.runtime.graph.read import read_graph
    from torchserve_dag.runtime.project.folders import Project

    with failures():
        checked = Project(project_root(project))
        problems: list[Problem] = []
        good = []
        for target in targets(checked, names or [], problems):
            try:
                graph = read_graph(checked, target.file.path)
            except CheckError as error:
                problems += [problem for problem in error.problems if problem not in problems]
            else:
                good.append(
                    {
                        "kind": target.folder.removesuffix("s"),
                        "name": target.name,
                        "version": target.version,
                        "file": str(target.file.path),
                        "takes": plain.name_of(graph.request),
                        "answers": plain.name_of(graph.answer),
                    }
                )
        if not names:
            problems += _served_problems(checked.root, {(one["name"], one["version"]) for one in good})
    if json:
        print_json({"checked": good, "problems": problems})
    else:
        for one in good:
            what = f"{one['name']} {one['version']}: {one['takes']} -> {one['answers']}"
            out.print(f"[green]ok[/] {one['kind']:8} {escape(what)}")
        print_problems(problems)
        out.print(f"{len(good)} in order, {count(len(problems), 'problem')}")
    raise typer.Exit(1 if problems else 0)
