"""`torchserve-dag logs`: what every process of the project's server logged, in the order of time."""

from __future__ import annotations

import datetime as dt
import json as json_module
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from torchserve_dag.commands import durations
from torchserve_dag.commands.common import JsonOption, ProjectOption, err, fail, failures, out, project_root

if TYPE_CHECKING:
    from torchserve_dag.stack.log_lines import Entry

COLOURS = {"worker": "green", "request": "cyan", "refused": "yellow", "envoy": "magenta", "torchserve": "blue"}


def logs(
    name: Annotated[
        str | None, typer.Argument(metavar="MODEL[/VERSION]", help="Only what is about this model, or this version.")
    ] = None,
    *,
    request: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Only what is about this request, with the exception that failed it."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Only this last time: 10m, 6h, 7d; by default 1h, and with --request all."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is logged from now on.")] = False,
    json: JsonOption = False,
    project: ProjectOption = None,
) -> None:
    """Show the logs of the front door, the requests, TorchServe, its workers and the keeper as one."""
    from torchserve_dag.server.state import State
    from torchserve_dag.stack import log_lines

    model, _, version = (name or "").partition("/")
    begin = None if since is None and request else _begin(since or "1h")
    wanted = log_lines.Wanted(model or None, version or None, request, begin)
    with failures():
        folder = State(project_root(project)).logs
        if not folder.is_dir():
            fail(f"There are no logs in {folder}: start the server with torchserve-dag up.")
        found = log_lines.read(folder, wanted)
        _show(found, json=json)
        if follow:
            try:
                _show(log_lines.follow(folder, wanted), json=json)
            except KeyboardInterrupt:
                return
        elif not found and request:
            fail(f"The logs have nothing about a request {request}: they keep the last lines only (docs/exposed.md).")
        elif not found:
            err.print("Nothing was logged in this time." if begin else "Nothing was logged.")


def _begin(since: str) -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc) - dt.timedelta(seconds=durations.seconds(since, "10m, 6h or 7d"))


def _show(entries: Iterable[Entry], *, json: bool) -> None:
    for entry in entries:
        if json:
            fields = {"time": entry.time.isoformat(), "source": entry.source, "file": entry.file, "text": entry.text}
            named = {"model": entry.model, "version": entry.version} if entry.model else {}
            more = {"request": entry.fields} if entry.fields else {}
            sys.stdout.write(json_module.dumps({**fields, **named, **more}, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        else:
            out.print(_line(entry), soft_wrap=True)


def _line(entry: Entry) -> Text:
    about = f"{entry.model}/{entry.version} " if entry.model and entry.fields is None else ""
    clock = f"{entry.time.astimezone():%m-%d %H:%M:%S.%f}"[:-3]
    style = COLOURS.get(entry.source, "white")
    return Text.assemble((clock, "dim"), " ", (f"{entry.source:10}", style), " ", (about, "bold"), _shown(entry.text))


def _shown(text: str) -> str:
    """The text without what a terminal obeys: a client may have written it."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
