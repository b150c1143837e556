"""`torchserve-dag check`: what is wrong with handlers and workflows, before anything is built."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from torchserve_dag import plain
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


def check(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME[/VERSION]]...", help="All unless given.")] = None,
    *,
    json: JsonOption = False,
    project: ProjectOption = None,
) -> None:
    """Check handlers and workflows: names, types along every edge, settings, cards."""
    # Here and in `build`: importing torch takes seconds, and `down` or `--help` should not.
    from torchserve_dag.archives.build import targets  # noqa: PLC0415
    from torchserve_dag.engine.workflow import read_graph  # noqa: PLC0415
    from torchserve_dag.project import Project  # noqa: PLC0415
    from torchserve_dag.source import CheckError, Problem  # noqa: PLC0415

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
    if json:
        print_json({"checked": good, "problems": problems})
    else:
        for one in good:
            what = f"{one['name']} {one['version']}: {one['takes']} -> {one['answers']}"
            out.print(f"[green]ok[/] {one['kind']:8} {escape(what)}")
        print_problems(problems)
        out.print(f"{len(good)} in order, {count(len(problems), 'problem')}")
    raise typer.Exit(1 if problems else 0)
