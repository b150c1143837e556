"""What all commands share: the project they are for, how they print, how they fail."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from torchserve_dag.archives.build import LeftOut
    from torchserve_dag.runtime.data.source import Problem

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

ProjectOption = Annotated[
    Path | None,
    typer.Option(
        "--project", metavar="DIR", help="The project's folder; by default the nearest with handlers/ or workflows/."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

FOLDERS = ("handlers", "workflows")


def project_root(named: Path | None) -> Path:
    """The project's folder, relative to the working directory so that messages name its files in short."""
    if named is not None:
        if not _is_project(named):
            fail(
                f"{named} is not a project: it has neither handlers/ nor workflows/. "
                f"Name another, or make one: torchserve-dag new {named}"
            )
        return named
    start = Path.cwd()
    root = next((folder for folder in (start, *start.parents) if _is_project(folder)), None)
    if root is None:
        fail(
            f"{start} is not in a project: neither it nor a folder above it has handlers/ or workflows/. "
            "Name a project with --project, or make one: torchserve-dag new DIR"
        )
    return Path(os.path.relpath(root))


def _is_project(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in FOLDERS)


def fail(sentence: str) -> NoReturn:
    """End the command with one sentence and exit code 1."""
    err.print(f"[bold red]error:[/] {escape(sentence)}", soft_wrap=True)
    raise typer.Exit(1)


@contextmanager
def failures() -> Iterator[None]:
    """Turn expected exceptions into one sentence and exit code 1, without a traceback."""
    try:
        yield
    except OSError as error:
        fail(f"{error.filename or 'A file'}: {error.strerror or error}.")
    except Exception as error:
        from torchserve_dag.clients import ServingError
        from torchserve_dag.runtime.data.source import CheckError
        from torchserve_dag.server.errors import ServerError

        if not isinstance(error, CheckError | ServerError | ServingError):
            raise
        fail(str(error))


def print_json(value: Any, *, indent: int | None = 2) -> None:
    from torchserve_dag.runtime.data import plain

    sys.stdout.write(json.dumps(plain.flatten(value), indent=indent, ensure_ascii=ascii_only(), default=str) + "\n")


def ascii_only() -> bool:
    """Whether the output may lack characters: what is no ASCII must be written otherwise."""
    return out.options.ascii_only


def print_problems(problems: list[Problem]) -> None:
    for problem in problems:
        err.print(f"[bold red]error:[/] {escape(str(problem))}", soft_wrap=True)


def print_left_out(left_out: Sequence[LeftOut], word: str = "left out") -> None:
    """What `build` does not build, and why, without that being a mistake."""
    for left in left_out:
        out.print(f"[yellow]{word:9}[/] {left.name} {left.version}", soft_wrap=True)
        for reason in left.reasons:
            out.print(f"  {escape(str(reason))}", soft_wrap=True)


def count(number: int, what: str) -> str:
    """`1 handler`, `2 handlers`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
