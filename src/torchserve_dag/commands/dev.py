"""`torchserve-dag dev`: the project's folder, served as it stands."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from torchserve_dag.commands.common import ProjectOption, count, err, fail, failures, out, print_problems, project_root

if TYPE_CHECKING:
    from torchserve_dag.dev.server import Changed

HOST = "127.0.0.1"


def dev(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME[/VERSION]",
            help="Workflows and handlers to serve; by default all workflows, or all handlers where there are none.",
        ),
    ] = None,
    *,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="The port on this machine; 0 takes any.")] = 8080,
    project: ProjectOption = None,
) -> None:
    """Serve the project's folder as it stands, on this machine only, and again whenever a file is saved."""
    from torchserve_dag.dev.loader import DevLoader
    from torchserve_dag.dev.server import DevServer
    from torchserve_dag.direct import http
    from torchserve_dag.runtime.project.folders import Project
    from torchserve_dag.server import properties

    with failures():
        root = project_root(project)
        max_body = properties.max_body(properties.read(properties.find(root)))
        try:
            listening = http.listen(HOST, port)
        except OSError as error:
            fail(
                f"{HOST}:{port} cannot be listened at ({error.strerror}): name another port with --port, or 0 for any."
            )
        address = f"http://{HOST}:{listening.getsockname()[1]}"
        out.print(f"loading {escape(str(root.resolve()))} …")
        loader = DevLoader(Project(root), names or ())
        DevServer(loader, max_body, lambda changed: _show(changed, address, root)).run(listening)
    out.print("ended")


def _show(changed: Changed, address: str, root: Path) -> None:
    clock, loaded = time.strftime("%H:%M:%S"), changed.state
    if changed.files:
        shown = [str(path.relative_to(root)) for path in changed.files[:3]]
        more = f" and {count(len(changed.files) - 3, 'other file')}" if len(changed.files) > 3 else ""  # noqa: PLR2004
        out.print(f"[dim]{clock}[/] saved: {escape(', '.join(shown))}{more}", soft_wrap=True)
    for name, version in sorted(loaded.new):
        where = f"{address}/predictions/{name}"
        out.print(f"[dim]{clock}[/] [green]serves[/] {name} {version} at {where}", soft_wrap=True)
    print_problems(list(loaded.problems))
    if loaded.problems:
        kept = ", ".join(f"{name} {version}" for name, version in sorted(loaded.services.keys() - loaded.new))
        if kept or not loaded.new:
            err.print(f"[dim]{clock}[/] {f'served as it was before: {kept}' if kept else 'nothing is served'}")
    elif changed.files and not loaded.new:
        out.print(f"[dim]{clock}[/] nothing that is served has changed")
    if loaded.new:
        out.print(f"[dim]{clock}[/] loaded in {changed.seconds:.1f} s; Ctrl-C ends", soft_wrap=True)
