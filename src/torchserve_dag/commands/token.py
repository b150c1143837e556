"""`torchserve-dag token`: the front door's tokens, each with a name, an expiry and a rate limit."""

from __future__ import annotations

import datetime as dt
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from torchserve_dag.commands import durations
from torchserve_dag.commands.common import JsonOption, ProjectOption, err, fail, failures, out, print_json, project_root

if TYPE_CHECKING:  # it is slow to import
    from torchserve_dag.front_door.tokens import Token

token = typer.Typer(help="Issue, list and revoke the front door's tokens.", no_args_is_help=True)


@token.command("new")
def new(
    name: Annotated[str, typer.Argument(help="The token's owner, a name that is logged with every request.")],
    *,
    expires: Annotated[str, typer.Option(metavar="TIME", help="How long the token is valid: 12h, 30d, 1y.")] = "90d",
    rate: Annotated[
        int | None, typer.Option(min=1, help="Its limit of requests per second; by default as in front_door.yaml.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Its limit of language models' tokens in a minute, prompts and answers.")
    ] = None,
    models: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="The language models that it may call; by default all.")
    ] = None,
    project: ProjectOption = None,
) -> None:
    """Issue a token and print it. It is not stored, so it cannot be printed again.

    With --tokens-per-minute or --models it calls models by OpenAI's API at /v1 only.
    """
    from torchserve_dag.front_door.door import Door
    from torchserve_dag.server.state import State

    lives_s = durations.seconds(expires, "12h, 30d or 1y")
    if lives_s < 1:
        fail(f"A token that is valid for {expires} would never be accepted: write 12h, 30d or 1y.")
    with failures():
        door = Door(State(project_root(project)))
        named = [model.strip() for model in (models or "").split(",") if model.strip()]
        if models is not None and not named:
            fail("--models names no model: write --models NAME,NAME.")
        text = door.issue_token(name, lives_s, rate, tokens_per_minute, named)
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
        print_json([_fields(one) for one in tokens])
        return
    table = Table("token", "valid until", "requests a second", "tokens a minute", "models")
    for one in tokens:
        rate, tokens_per_minute = one.requests_per_second, one.tokens_per_minute
        limits = (str(rate or "as in front_door.yaml"), str(tokens_per_minute or ""), ", ".join(one.models))
        table.add_row(one.name, _date(one.expires), *limits)
    out.print(table)


@token.command("revoke")
def revoke(name: Annotated[str, typer.Argument(help="The token's name.")], *, project: ProjectOption = None) -> None:
    """Revoke a token: the front door refuses it from now on."""
    from torchserve_dag.front_door.door import Door
    from torchserve_dag.server.state import State

    with failures():
        Door(State(project_root(project))).revoke_token(name)
    out.print(f"{name} is revoked")


def _fields(one: Token) -> dict[str, Any]:
    limits = {"rate": one.requests_per_second, "tokens_per_minute": one.tokens_per_minute, "models": list(one.models)}
    return {"name": one.name, "expires": _date(one.expires), **limits}


def _date(seconds: int) -> str:
    return f"{dt.datetime.fromtimestamp(seconds, tz=dt.timezone.utc):%Y-%m-%d %H:%M} UTC"
