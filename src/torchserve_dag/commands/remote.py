"""The options of `call` and `status` for a server on any machine: address, trusted certificates, token."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchserve_dag.commands.common import fail

if TYPE_CHECKING:
    from torchserve_dag.clients import GrpcClient, RestClient

ServerOption = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="https://HOST:PORT",
        envvar="TORCHSERVE_DAG_SERVER",
        help="Call the front door of any machine. Without it, or with --project: the project's own server.",
    ),
]
CaOption = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        metavar="FILE",
        envvar="TORCHSERVE_DAG_CA",
        help="With --server: a PEM file with the certificates to trust, if no public authority signed the server's.",
    ),
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="TOKEN",
        envvar="TORCHSERVE_DAG_TOKEN",
        help="With --server: the token. Other users of the machine can read a command line: prefer --token-file.",
    ),
]
TokenFileOption = Annotated[
    Path | None, typer.Option("--token-file", metavar="FILE", help="With --server: a file that holds the token.")
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="With --server: accept any certificate, so that nothing proves who answers.")
]


def token_of(token: str | None, token_file: Path | None) -> str | None:
    """The token in the file, if there is a file, else `token`. Raises OSError if the file cannot be read."""
    return token if token_file is None else token_file.read_text("utf-8").strip()


def remote_client(
    server: str, ca: Path | None, token: str | None, *, insecure: bool, grpc: bool
) -> RestClient | GrpcClient:
    """A client of a server on any machine. Raises OSError if `ca` cannot be read, ServingError as GrpcClient does."""
    os.environ.setdefault(
        "GRPC_VERBOSITY", "NONE"
    )  # without this, grpc writes its own lines beside the command's sentence
    from torchserve_dag.clients import GrpcClient, RestClient

    kind: type[GrpcClient | RestClient] = GrpcClient if grpc else RestClient
    try:
        return kind(server, token=token, ca=None if insecure else ca, insecure=insecure)
    except ValueError as error:
        fail(f"{error}.")
