"""`torchserve-dag call`: one request to the server of this project."""

from __future__ import annotations

import json as json_text
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from torchserve_dag.commands.common import JsonOption, ProjectOption, fail, failures, out, project_root
from torchserve_dag.server.connect import client
from torchserve_dag.server.state import State


def call(
    name: Annotated[str, typer.Argument(metavar="NAME[/VERSION]", help="A handler or a workflow that is served.")],
    file: Annotated[Path, typer.Argument(help="What to send: a photo, a text, JSON.")],
    *,
    grpc: Annotated[bool, typer.Option("--grpc", help="Over gRPC; REST unless given.")] = False,
    param: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A parameter; may be repeated.")] = None,
    timeout: Annotated[float, typer.Option(help="How long to wait for the answer, in seconds.")] = 60.0,
    json: JsonOption = False,
    project: ProjectOption = None,
) -> None:
    """Send a file to a model, and print its answer."""
    model, _, version = name.partition("/")
    with failures():
        parameters = dict(_parameter(one) for one in param or [])
        if not file.is_file():
            fail(f"{file} is not a file.")
        with client(State(project_root(project)), "grpc" if grpc else "rest") as serving:
            answer = serving.predict(model, file, version or None, parameters=parameters or None, timeout=timeout)
    _print(answer, raw=json)


def _parameter(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        fail(f'"{text}" is not a parameter; write KEY=VALUE.')
    return key, value


def _print(answer: Any, *, raw: bool) -> None:
    if isinstance(answer, bytes):  # a picture, say: for a file or another program
        if sys.stdout.isatty():
            fail(f"The answer is {len(answer):,} bytes, not text: send them somewhere with > FILE.")
        sys.stdout.buffer.write(answer)
    elif raw:
        sys.stdout.write(json_text.dumps(answer, ensure_ascii=False) + "\n")
    else:
        out.print_json(data=answer, ensure_ascii=False)
