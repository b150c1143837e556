"""The command line, `torchserve-dag`: one module for each group of commands."""

from __future__ import annotations

from collections.abc import Callable

import typer

from torchserve_dag.commands.bench import bench
from torchserve_dag.commands.build import build
from torchserve_dag.commands.call import call
from torchserve_dag.commands.check import check
from torchserve_dag.commands.experiment import experiment
from torchserve_dag.commands.graph import graph
from torchserve_dag.commands.release import promote, retire, rollback, rollout, routes
from torchserve_dag.commands.serve import default, down, status, up
from torchserve_dag.commands.token import token
from torchserve_dag.commands.tune import tune

app = typer.Typer(
    name="torchserve-dag",
    help="Workflows of models on TorchServe: check, build, serve and call them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

COMMANDS: tuple[Callable[..., None], ...] = (
    check, graph, tune, build, up, status, call, default, down, routes, rollout, promote, rollback, retire,
    experiment, bench,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
app.add_typer(token, name="token")
