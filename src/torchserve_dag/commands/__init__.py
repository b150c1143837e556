"""The command line, `torchserve-dag`: one module for each group of commands.

Each command imports what it needs inside its function, so that `--help` and `call` are quick, and work in an
environment with only the packages that a client needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from torchserve_dag.commands.add import add
from torchserve_dag.commands.bench import bench
from torchserve_dag.commands.build import build
from torchserve_dag.commands.call import call
from torchserve_dag.commands.chat import chat
from torchserve_dag.commands.check import check
from torchserve_dag.commands.common import fail
from torchserve_dag.commands.dev import dev
from torchserve_dag.commands.evaluate import evaluate
from torchserve_dag.commands.experiment import experiment
from torchserve_dag.commands.export import export
from torchserve_dag.commands.graph import graph
from torchserve_dag.commands.index import index
from torchserve_dag.commands.logs import logs
from torchserve_dag.commands.new import new
from torchserve_dag.commands.release import promote, retire, rollback, rollout, routes
from torchserve_dag.commands.release import serve as serve_version  # `serve` is a module of this package
from torchserve_dag.commands.serve import default, down, restart, status, up
from torchserve_dag.commands.token import token
from torchserve_dag.commands.tune import tune


class _Commands(TyperGroup):
    """If a command lacks a package that only `[serve]` installs, fails with the command that installs it."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):  # a terminal may have no character for all that is printed
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing in {"", "torchserve_dag"}:
                raise
            extra = "retrieval" if missing in {"lancedb", "pyarrow", "pypdf"} else "serve"
            fail(
                f"torchserve-dag {ctx.invoked_subcommand} needs {missing}, which is not installed: "
                f"pip install 'torchserve-dag[{extra}]'"
            )


app = typer.Typer(
    name="torchserve-dag",
    cls=_Commands,
    help="Workflows of models on TorchServe: check, build, serve and call them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

COMMANDS: tuple[Callable[..., None], ...] = (
    new, check, graph, dev, tune, export, index,
    build, up, serve_version, status, logs, call, chat, default, restart, down,
    routes, evaluate,
    rollout, promote, rollback, retire, experiment, bench,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
app.add_typer(add, name="add")
app.add_typer(token, name="token")


def _print_version(wanted: bool) -> None:  # noqa: FBT001 (typer calls it so)
    if wanted:
        from importlib.metadata import version

        sys.stdout.write(f"torchserve-dag {version('torchserve-dag')}\n")
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    """Workflows of models on TorchServe: check, build, serve and call them."""
