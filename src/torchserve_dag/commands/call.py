"""`torchserve-dag call`: one request to the project's server, or to a server on any machine."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchserve_dag.commands.common import (
    JsonOption,
    ProjectOption,
    ascii_only,
    fail,
    failures,
    out,
    print_json,
    project_root,
)
from torchserve_dag.commands.remote import (
    CaOption,
    InsecureOption,
    ServerOption,
    TokenFileOption,
    TokenOption,
    remote_client,
    token_of,
)

if TYPE_CHECKING:
    from torchserve_dag.clients import GrpcClient, RestClient


def call(
    name: Annotated[str, typer.Argument(metavar="NAME[/VERSION]", help="A handler or a workflow that is served.")],
    message: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE|FIELD=VALUE",
            help="The file to send: a photo, a text, JSON; - is the standard input. A message with several fields: "
            "FIELD=VALUE or FIELD=@FILE for each.",
        ),
    ] = None,
    *,
    grpc: Annotated[bool, typer.Option("--grpc", help="Call over gRPC instead of REST.")] = False,
    param: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A parameter; may be repeated.")] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A header that routes.yaml asks for; may be repeated."),
    ] = None,
    request_id: Annotated[str | None, typer.Option(help="The request's id in logs and feedback.")] = None,
    output: Annotated[
        list[str] | None,
        typer.Option(metavar="NODE", help="Get this node's result instead of the workflow's output; may be repeated."),
    ] = None,
    bulk: Annotated[bool, typer.Option("--bulk", help="Give way to interactive requests on the server.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer's chunks as they arrive.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 60.0,
    json: JsonOption = False,
    server: ServerOption = None,
    ca: CaOption = None,
    token: TokenOption = None,
    token_file: TokenFileOption = None,
    insecure: InsecureOption = False,
    project: ProjectOption = None,
) -> None:
    """Send a file, or a message field by field, to a model, and print its answer."""
    from torchserve_dag.clients import Options

    model, _, version = name.partition("/")
    with _unsendable(), failures():
        options = Options(
            tuple(output or ()),
            priority="bulk" if bulk else "interactive",
            request_id=request_id,
            route_by=dict(_parameter(one) for one in header or []),
        )
        arguments: dict[str, Any] = {"parameters": dict(_parameter(one) for one in param or []), "options": options}
        sent = _message(message or [])
        if server and project is None:
            client = remote_client(server, ca, token_of(token, token_file), insecure=insecure, grpc=grpc)
        else:
            client = _client_of_project(project, grpc=grpc)
        with client as serving:
            if stream:
                _print_chunks(serving.stream(model, sent, version or None, timeout=timeout, **arguments))
                return
            answer = serving.predict(model, sent, version or None, timeout=timeout, **arguments)
    _print(answer, raw=json)


def _message(words: list[str]) -> Path | bytes | dict[str, Path | bytes]:
    """What the words name. Raises OSError if it cannot be read."""
    if not words:
        if sys.stdin.isatty():
            fail("Name a file to send, or write - and type what to send.")
        words = ["-"]
    (first, *more) = words
    if not more and ("=" not in first or Path(first).exists()):
        return _content(first)
    fields: dict[str, Path | bytes] = {}
    for word in words:
        field, equals, value = word.partition("=")
        if not field or not equals:
            fail(f'"{word}" is neither FIELD=VALUE nor FIELD=@FILE; one file alone is sent as it is.')
        if field in fields:
            fail(f"{field} is given twice.")
        fields[field] = _content(value[1:]) if value.startswith("@") else value.encode()
    return fields


def _content(file: str) -> Path | bytes:
    """A file, whose name may tell its type; the bytes of a pipe."""
    if file in {"-", "/dev/stdin"}:
        return sys.stdin.buffer.read()
    path = Path(file)
    if path.is_file():
        return path
    if path.is_dir() or not path.exists():
        fail(f"{file} is not a file.")
    return path.read_bytes()


def _client_of_project(project: Path | None, *, grpc: bool) -> RestClient | GrpcClient:
    from torchserve_dag.server.state import State
    from torchserve_dag.stack.connect import client

    return client(State(project_root(project)), "grpc" if grpc else "rest")


@contextmanager
def _unsendable() -> Iterator[None]:
    """Turn the client's ValueError, for a parameter or an option, into an error of the command."""
    try:
        yield
    except ValueError as error:
        fail(f"{error}.")


def _parameter(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        fail(f'"{text}" is not a parameter; write KEY=VALUE.')
    return key, value


def _print_chunks(chunks: Generator[bytes, None, None]) -> None:
    """Print each chunk as it arrives, and a newline after the last."""
    last = b"\n"
    try:
        with closing(chunks):
            for last in chunks:
                sys.stdout.buffer.write(last)
                sys.stdout.buffer.flush()
    finally:
        if not last.endswith(b"\n"):
            sys.stdout.buffer.write(b"\n")
            sys.stdout.buffer.flush()


def _print(answer: Any, *, raw: bool) -> None:
    if isinstance(answer, bytes):  # such as a picture, for a file or another program
        if sys.stdout.isatty():
            fail(f"The answer is {len(answer):,} bytes, not text: redirect the output with > FILE.")
        sys.stdout.buffer.write(answer)
    elif raw:
        print_json(answer, indent=None)
    else:
        out.print_json(data=answer, ensure_ascii=ascii_only())
