"""`torchserve-dag token`: the front door's tokens, each with a name, an expiry and a rate limit."""

from __future__ import annotations

import datetime as dt
import sys
from typing import Annotated

import typer
from rich.table import Table

from torchserve_dag.commands import durations
from torchserve_dag.commands.common import JsonOption, ProjectOption, err, fail, failures, out, print_json, project_root

token = typer.Typer(help="Issue, list and revoke the front door's tokens.", no_args_is_help=True)


@token.command("new")
def new(
    name: Annotated[str, typer.Argument(help="The token's owner, a name that is logged with every request.")],
    *,
    expires: Annotated[str, typer.Option(metavar="TIME", help="How long the token is valid: 12h, 30d, 1y.")] = "90d",
    rate: Annotated[
        int | None, typer.Option(min=1, help="Its limit of requests per second; by default as in front_door.yaml.")
    ] = None,
    project: ProjectOption = None,
) -> None:
    """Issue a token and print it. It is not stored, so it cannot be printed again."""
    from torchserve_dag.front_door.door import Door
    from torchserve_dag.server.state import State

    lives_s = durations.seconds(expires, "12h, 30d or 1y")
    if lives_s < 1:
        fail(f"A token that is valid for {expires} would never be accepted: write 12h, 30d or 1y.")
    with failures():
        door = Door(State(project_root(project)))
        text = door.issue_token(name, lives_s, rate)
    err.print(f"A token for {name}, valid for {expires}:")
    sys.stdout.write(text + "\n")


@token.command("list")
def list_all(*, json: JsonOption = False, project: ProjectOption = None) -> None:
    """List the valid tokens."""
    from torchserve_dag.front_door.door import Door
    from torchserve_dag.server.state import State

    with failures():
        tokens = Door(State(project_root(project))).tokens.issued()
    if json:
        print_json([{"name": t.name, "expires": _date(t.expires), "rate": t.requests_per_second} for t in tokens])
        return
    table = Table("token", "valid until", "requests a second")
    for one in tokens:
        table.add_row(one.name, _date(one.expires), str(one.requests_per_second or "as in front_door.yaml"))
    out.print(table)


@token.command("revoke")
def revoke(name: Annotated[str, typer.Argument(help="The token's name.")], *, project: ProjectOption = None) -> None:
    """Revoke a token: the front door refuses it from now on."""
    from torchserve_dag.front_door.door import Door
    from torchserve_dag.server.state import State

    with failures():
        Door(State(project_root(project))).revoke_token(name)
    out.print(f"{name} is revoked")


def _date(seconds: int) -> str:
    return f"{dt.datetime.fromtimestamp(seconds, tz=dt.timezone.utc):%Y-%m-%d %H:%M} UTC"
