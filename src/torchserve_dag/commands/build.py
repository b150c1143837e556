"""`torchserve-dag build`: archives of handlers and workflows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from torchserve_dag.commands.common import (
    JsonOption,
    ProjectOption,
    err,
    failures,
    out,
    print_json,
    print_left_out,
    print_problems,
    project_root,
)


def build(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME[/VERSION]", help="What to build; by default all.")
    ] = None,
    *,
    store: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder for the archives; by default model_store.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace a version that is built already, unless it is served or decided on."),
    ] = False,
    update_cards: Annotated[
        bool,
        typer.Option("--update-cards", help="First write the sha256 of the weights on this machine into the cards."),
    ] = False,
    json: JsonOption = False,
    project: ProjectOption = None,
) -> None:
    """Build an archive for each named handler and workflow, or for all whose weights are on this machine."""
    from torchserve_dag.archives.build import build as build_all
    from torchserve_dag.runtime.project.folders import Project
    from torchserve_dag.stack import settings

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with failures(), Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        root = project_root(project)
        report = build_all(
            Project(root),
            names or [],
            store=store,
            force=force,
            update_cards=update_cards,
            fixed=settings.fixed(root) if force else {},
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    if json:
        print_json(report)
    else:
        for card in report.updated:
            out.print(
                f"[green]card[/]      {escape(card.file)}: {escape(card.weights)} is {card.sha256}", soft_wrap=True
            )
        for built in report.built:
            state = f"[green]{built.state:9}[/]"
            out.print(f"{state} {escape(str(built.path))}  {built.note or decimal(built.size)}", soft_wrap=True)
        print_left_out(report.left_out)
        print_left_out(report.not_exported, "no .war")
        print_problems(report.problems)
    raise typer.Exit(1 if report.problems else 0)
