"""`torchserve-dag up`, `down`, `status` and `default`: the server of this project."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
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
    from torchserve_dag.archives.archive import Archive
    from torchserve_dag.server.ready import Readiness
    from torchserve_dag.server.selection import Remark
    from torchserve_dag.server.status import Status, VersionStatus, WorkerStatus


def up(
    *,
    port: Annotated[
        int | None,
        typer.Option(help="TorchServe's REST port; the next two are for management and metrics; by default 8080."),
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="TorchServe's gRPC port; the next is for management; by default 7070.")
    ] = None,
    free_ports: Annotated[bool, typer.Option("--free-ports", help="Use any free ports.")] = False,
    store: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder of the archives; by default model_store.")
    ] = None,
    front_door: Annotated[
        bool,
        typer.Option(
            "--front-door/--no-front-door",
            help="Start Envoy too, which splits traffic between versions and may face a network.",
        ),
    ] = True,
    host: Annotated[
        Literal["torchserve", "direct"] | None,
        typer.Option(
            help="What the models' workers belong to: torchserve, or direct; by default torchserve-dag.yaml's."
        ),
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Log a line for each request in access_log.log.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Serve all or nothing: fail if anything cannot be served.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait until every model is ready.")] = 600.0,
    foreground: Annotated[
        bool,
        typer.Option(
            "--foreground",
            help="Stay, log to the standard output, and drain on SIGTERM: for systemd and containers.",
        ),
    ] = False,
    project: ProjectOption = None,
) -> None:
    """Start the front door and the host, and wait until all that can be served is; start again what has ended.

    It loads the versions that routes.yaml and releases.yaml name, and the newest of the rest, and says what it leaves
    out.
    """
    from torchserve_dag.front_door.door import Door
    from torchserve_dag.server import launch
    from torchserve_dag.server.connect import management_client, running
    from torchserve_dag.server.state import State
    from torchserve_dag.server.status import status as status_of
    from torchserve_dag.stack import start as stack
    from torchserve_dag.stack import supervise

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends a half-started server
    options = launch.StartOptions(port, grpc_port, free_ports, store, access_log, timeout)
    with failures(), _progress(lines=foreground) as show:
        root = project_root(project)
        state = State(root)
        remarks: Sequence[Remark] = ()
        stack.end_half_started(root)
        if stack.runs(state):
            supervise.check_mendable(state, foreground=foreground)
            if foreground:
                out.print("[green]up[/]: takes over the server that runs")
                supervise.become_watcher(state)
        else:
            remarks = stack.start(
                root,
                options,
                lambda seen: show(*_loading(seen)),
                host=host,
                with_front_door=front_door,
                strict=strict,
            ).remarks
        if not foreground:
            supervise.start(state)
            supervise.wait_until_whole(state, timeout, show)
        with management_client(state) as client:
            found = status_of(state, running(state), client)
    where, door = running(state).addresses, Door(state).record()
    watcher = "" if foreground else f", pid {supervise.watcher_pid(state)}"
    out.print(f"[green]up[/]: {count(len(found.versions), 'model version')}{watcher}")
    if door and door.tls:
        out.print(f"  front door https://{door.settings.listen} (REST and gRPC)  {door.settings.metrics}/metrics")
    out.print(
        f"  REST {where.inference}  management {where.management}  metrics {where.metrics}/metrics", soft_wrap=True
    )
    out.print(f"  gRPC {where.grpc_inference}  management {where.grpc_management}")
    out.print(f"  tokens and logs in {State(root).folder}", soft_wrap=True)
    _print_remarks(remarks)
    if foreground:
        sys.stdout.flush()
        supervise.become_watcher(state)


def _print_remarks(remarks: Sequence[Remark]) -> None:
    for remark in remarks:
        colour = "bold yellow" if remark.fault else "yellow" if remark.kind == "new" else "dim"
        err.print(f"[{colour}]{remark.kind}[/]: {escape(str(remark))}", soft_wrap=True)


@contextmanager
def _progress(*, lines: bool) -> Iterator[Callable[..., None]]:
    """Shows a text, the number of models that are ready, and that of all: in a bar, or as a line for each new text."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = lines or not err.is_terminal
    with Progress(*columns, console=err, transient=True, disable=hidden) as bar:
        task, last = bar.add_task("starting", total=None), ""

        def show(text: str, completed: int = 0, total: int | None = None) -> None:
            nonlocal last
            bar.update(task, description=text, completed=completed, total=total)
            if lines and text != last:
                out.print(escape(text), soft_wrap=True)
            last = text

        yield show


def _loading(seen: list[Readiness]) -> tuple[str, int, int]:
    waiting = [f"{one.name} {one.version}" for one in seen if not one.done]
    return f"loading {waiting[0]}" if waiting else "ready", len(seen) - len(waiting), len(seen)


def down(*, project: ProjectOption = None) -> None:
    """Stop the server that `up` started."""
    from torchserve_dag.stack import start as stack

    with failures():
        stopped = stack.stop(project_root(project))
    out.print("stopped" if stopped else "nothing was running")


def status(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME[/VERSION]", help="Describe this model: its card, inputs, graph.")
    ] = None,
    *,
    json: JsonOption = False,
    server: ServerOption = None,
    ca: CaOption = None,
    token: TokenOption = None,
    token_file: TokenFileOption = None,
    insecure: InsecureOption = False,
    project: ProjectOption = None,
) -> None:
    """Show what the project's server serves: versions, shares, workers, queues. With --server: whether it is up."""
    with failures():
        if server and project is None:
            if name is not None:
                fail(f"{server} does not describe its models: ask for {name} on its own machine, in its project.")
            found = _remote_status(server, ca, token_of(token, token_file), insecure=insecure)
            print_json(found) if json else _print_fields(found)
        else:
            _project_status(project_root(project), name, json=json)


def _remote_status(server: str, ca: Path | None, token: str | None, *, insecure: bool) -> dict[str, Any]:
    """Whether a server is up and accepts a token; its front door tells a client no more."""
    with remote_client(server, ca, token, insecure=insecure, grpc=False) as rest:
        if not rest.ready():
            fail(f"{server} is not up: nothing answers there, or its TorchServe is not healthy.")
    accepted = None
    if token and server.startswith("https://"):
        # Over REST the front door answers /ping without a token; over gRPC it checks the token.
        with remote_client(server, ca, token, insecure=insecure, grpc=True) as grpc:
            accepted = grpc.ready() or None
    return {"server": server, "state": "up", **({"token": "accepted"} if accepted else {})}


def _project_status(root: Path, name: str | None, *, json: bool) -> None:
    from torchserve_dag.archives.archive import copies
    from torchserve_dag.front_door.door import Door
    from torchserve_dag.runtime.data import plain
    from torchserve_dag.server.connect import is_running, management_client, running
    from torchserve_dag.server.state import State
    from torchserve_dag.server.status import about
    from torchserve_dag.server.status import status as status_of
    from torchserve_dag.server.supervised import Supervised

    state = State(root)
    report = Supervised(state).report()
    problems = [one.problem for one in report if one.problem]
    if problems and not is_running(state):
        if json:
            print_json({"processes": report})
        fail(" ".join(problems))
    record = running(state)
    with management_client(state) as client:
        if name is not None:
            model, _, version = name.partition("/")
            fields = dict(about(client, model, version or None))
            archive = copies(state.archives).get((model, str(fields.get("version"))))
            if archive:
                fields |= {"hash": archive.hash}
            print_json(fields) if json else _print_about(fields, archive)
            return
        found, door = status_of(state, record, client), Door(state)
        front_door = door.record()
        shares = {one.model: one.shares for one in door.traffic().splits} if front_door else {}
        listens = front_door.settings.listen if front_door and front_door.tls else None
        if json:
            print_json({**plain.flatten(found), "front_door": listens, "shares": shares, "processes": report})
        else:
            _print_status(found, listens, shares)
        if problems:
            fail(" ".join(problems))


def default(
    name: Annotated[str, typer.Argument(help="A model that is served.")],
    version: Annotated[str, typer.Argument(help="One of its versions.")],
    *,
    project: ProjectOption = None,
) -> None:
    """Make VERSION the default, which answers requests that name no version, now and after restarts."""
    from torchserve_dag.stack import start as stack

    with failures():
        root = project_root(project)
        stack.set_default(root, name, version)
    out.print(f"{name}: {version} is the default")


def restart(
    name: Annotated[str, typer.Argument(metavar="NAME[/VERSION]", help="A model that the direct host serves.")],
    *,
    timeout: Annotated[float, typer.Option(help="Seconds until the last worker must be replaced.")] = 600.0,
    project: ProjectOption = None,
) -> None:
    """Replace a version's workers one by one, without losing a request; without VERSION those of the default."""
    from torchserve_dag.server.state import State
    from torchserve_dag.stack.restart import restart as replace_workers

    model, _, version = name.partition("/")
    with failures(), err.status(f"replacing the workers of {escape(name)}") as shown:
        which, workers = replace_workers(
            State(project_root(project)),
            model,
            version or None,
            timeout,
            lambda new, all_: shown.update(f"replacing the workers of {escape(name)}: {new} of {all_}"),
        )
    out.print(f"{model}/{which}: {count(workers, 'new worker')}")


def _print_status(found: Status, front_door: str | None, shares: Mapping[str, Mapping[str, float]]) -> None:
    if front_door:
        out.print(f"front door https://{front_door}")
    out.print(f"pid {found.pid}, REST {found.addresses['inference']}, gRPC {found.addresses['grpc_inference']}")
    table = Table("model", "share" if front_door else "", "state", "batch", "queue", "hash", "worker pids")
    table.columns[0].no_wrap = True
    for one in found.versions:
        colour = "green" if one.state == "ready" else "yellow"
        table.add_row(
            f"{one.name}/{one.version}",
            _share(one, shares) if front_door else "default" if one.default else "",
            f"[{colour}]{one.state}[/]",
            str(one.batch_size),
            str(one.pending),
            one.hash,
            "\n".join(_worker(worker) for worker in one.workers if worker.pid > 0),
        )
    out.print(table)
    _print_remarks(found.remarks)


def _share(one: VersionStatus, shares: Mapping[str, Mapping[str, float]]) -> str:
    return f"{shares.get(one.name, {one.version: float(one.default)}).get(one.version, 0.0):.0%}"


def _worker(worker: WorkerStatus) -> str:
    memory = f" {worker.memory_mb} MB" if worker.memory_mb is not None else ""
    return f"{worker.pid} {worker.device}{memory}"


def _print_about(fields: dict[str, Any], archive: Archive | None) -> None:
    graph = fields.pop("graph", None)
    _print_fields(fields)
    if graph and archive:
        from torchserve_dag.archives.unpacked import graph_of
        from torchserve_dag.pictures.tree import tree

        out.print("[bold]graph[/]")
        out.print(tree(graph_of(archive)), end="", markup=False, soft_wrap=True)


def _print_fields(fields: dict[str, Any], indent: int = 0) -> None:
    for key, value in fields.items():
        label = f"{' ' * indent}[bold]{escape(str(key))}[/]"
        if isinstance(value, dict):
            out.print(label)
            _print_fields(value, indent + 2)
        elif isinstance(value, list):
            for item in value:
                out.print(label)
                _print_fields(item if isinstance(item, dict) else {"": item}, indent + 2)
        else:
            out.print(f"{label} {escape(str(value))}", soft_wrap=True)
