"""`torchserve-dag index`: indexes of documents, built, updated, listed and rolled back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from torchserve_dag.commands.common import (
    JsonOption,
    ProjectOption,
    count,
    err,
    fail,
    failures,
    out,
    print_json,
    project_root,
)

if TYPE_CHECKING:
    from torchserve_dag.retrieval.update import IndexReport


def index(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="The documents: Markdown, text, HTML and PDF.")
    ] = None,
    *,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The index, indexes/NAME; by default the folder's name.")
    ] = None,
    embedding: Annotated[
        str, typer.Option(metavar="HANDLER", help="The handler that gives passages their vectors.")
    ] = "text_embedding",
    keep: Annotated[int, typer.Option(min=1, help="How many versions stay.")] = 3,
    list_: Annotated[bool, typer.Option("--list", help="List the versions of NAME, or of all indexes.")] = False,
    rollback: Annotated[int | None, typer.Option(metavar="VERSION", help="Let another version of NAME answer.")] = None,
    json: JsonOption = False,
    project: ProjectOption = None,
) -> None:
    """Index a folder of documents, or update its index: only what has changed is read again.

    Each change is a new version. A running server follows within a second.
    """
    from torchserve_dag.retrieval.documents import IndexingError

    with failures():
        root = project_root(project)
        try:
            if list_:
                _list(root, name, json=json)
            elif rollback is not None:
                _rollback(root, name, rollback, json=json)
            elif folder is None:
                fail("Name the folder of the documents: torchserve-dag index FOLDER.")
            else:
                _update(root, folder, name, embedding, keep, json=json)
        except IndexingError as error:
            fail(str(error))


def _update(root: Path, folder: Path, name: str | None, embedding: str, keep: int, *, json: bool) -> None:
    from torchserve_dag.retrieval.update import update
    from torchserve_dag.runtime.project.handler_file import NAME

    for quiet, value in (("TQDM_DISABLE", "1"), ("TRANSFORMERS_VERBOSITY", "error")):
        os.environ.setdefault(quiet, value)  # there is a bar already

    if not folder.is_dir():
        fail(f"{folder} is no folder.")
    name = name or folder.resolve().name
    if not NAME.match(name):
        fail(f'"{name}" is no name for an index: give one with --name, of lower-case letters, digits and underscores.')
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("looking", total=None)
        report = update(
            root,
            folder,
            name,
            embedding=embedding,
            keep=keep,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None),
        )
    if json:
        print_json(report)
    else:
        _print(report)


def _print(report: IndexReport) -> None:
    for problem in report.problems:
        err.print(f"[yellow]left out[/] {escape(problem)}", soft_wrap=True)
    if report.others:
        kinds = ", ".join(f"{number} {suffix}" for suffix, number in sorted(report.others.items()))
        err.print(f"[yellow]left out[/] files of other kinds: {escape(kinds)}", soft_wrap=True)
    state = "[green]built[/]" if report.changed else "[green]unchanged[/]"
    changes = f"{report.added} added, {report.updated} updated, {report.removed} removed"
    out.print(
        f"{state} {report.index}, version {report.version}: {count(report.documents, 'document')} in "
        f"{count(report.passages, 'passage')}; {changes}; {report.seconds:.1f} s",
        soft_wrap=True,
    )


def _list(root: Path, name: str | None, *, json: bool) -> None:
    from torchserve_dag.retrieval.versions import states

    versions = states(root, name)
    if json:
        print_json(versions)
        return
    if not versions:
        fail(f"There is no index{f' {name}' if name else ''}: torchserve-dag index FOLDER makes one.")
    table = Table(box=None, pad_edge=False)
    for column in ("index", "version", "", "made (UTC)", "documents", "passages", "size"):
        table.add_column(column, justify="right" if column in {"version", "documents", "passages", "size"} else "left")
    for one in versions:
        numbers = (f"{one.documents:,}", f"{one.passages:,}", decimal(one.bytes))
        made = one.created[:16].replace("T", " ")
        table.add_row(one.index, str(one.version), "answers" if one.current else "", made, *numbers)
    out.print(table)


def _rollback(root: Path, name: str | None, version: int, *, json: bool) -> None:
    from torchserve_dag.retrieval.versions import rollback, states

    if name is None:
        names = {one.index for one in states(root)}
        if len(names) != 1:
            fail("Name the index: torchserve-dag index --name NAME --rollback VERSION.")
        (name,) = names
    about = rollback(root, name, version)
    if json:
        print_json({"index": name, "version": about.version})
    else:
        out.print(f"[green]version {about.version}[/] of {name} answers: {count(len(about.documents), 'document')}")
