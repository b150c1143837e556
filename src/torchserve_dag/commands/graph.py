"""`torchserve-dag graph`: draw a workflow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchserve_dag.archives import atomic
from torchserve_dag.commands.common import JsonOption, ProjectOption, err, fail, failures, out, print_json, project_root

if TYPE_CHECKING:
    from torchserve_dag.pictures.picture import LiveRates
    from torchserve_dag.runtime.graph.graph import Graph
    from torchserve_dag.runtime.project.folders import Project
    from torchserve_dag.server.state import State


def graph(
    name: Annotated[str, typer.Argument(metavar="NAME[/VERSION]", help="A workflow, or a handler.")],
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write an .svg or .mmd file; by default Mermaid is printed."
        ),
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live", help="Draw what is served, with each node's rates; the busiest node has the strongest colour."
        ),
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds that --live measures.")] = 5.0,
    json: JsonOption = False,
    project: ProjectOption = None,
) -> None:
    """Draw a workflow: its nodes, the types on its edges, and with --live the load of each node."""
    from torchserve_dag.pictures.data import as_data
    from torchserve_dag.pictures.mermaid import mermaid
    from torchserve_dag.pictures.svg import svg
    from torchserve_dag.runtime.project.folders import Project
    from torchserve_dag.server.state import State

    drawers: dict[str, Callable[[Graph, LiveRates | None], str]] = {".svg": svg, ".mmd": mermaid}
    if output and output.suffix not in drawers:
        fail(f"{output} is neither an .svg nor an .mmd: choose one of these endings.")
    with failures():
        root = project_root(project)
        drawn = _served(State(root), name) if live else _in_project(Project(root), name)
        rates = _rates(State(root), drawn, seconds) if live else None
        if output:
            atomic.write_text(output, drawers[output.suffix](drawn, rates))
    if json:
        print_json(as_data(drawn, rates))
    elif output:
        out.print(f"wrote {output}", markup=False, soft_wrap=True)
    else:
        sys.stdout.write(mermaid(drawn, rates))


def _in_project(project: Project, name: str) -> Graph:
    from torchserve_dag.runtime.data import plain
    from torchserve_dag.runtime.graph.read import read_graph

    path = project.find("workflows", name) or project.find("handlers", name)
    if path is None:
        known = project.references("workflows") + project.references("handlers")
        fail(f'There is no workflow or handler "{name}"; {plain.did_you_mean(name, known)}')
    return read_graph(project, path)


def _served(state: State, name: str) -> Graph:
    """The graph of the archive that is served: the project's files may say something else by now."""
    from torchserve_dag.archives.archive import UnusableArchiveError, copies
    from torchserve_dag.archives.unpacked import graph_of
    from torchserve_dag.server.connect import management_client

    model, _, version = name.partition("/")
    with management_client(state) as client:
        served = {(info.name, one.version): one.default for info in client.models() for one in info.versions}
    version = version or next((one for (other, one), default in served.items() if other == model and default), "")
    archive = copies(state.archives).get((model, version))
    if (model, version) not in served or archive is None:
        fail(f"{name} is not served; these are: {', '.join('/'.join(one) for one in served)}.")
    try:
        return graph_of(archive)
    except UnusableArchiveError as error:
        fail(f"{model}/{version} {error}.")


def _rates(state: State, drawn: Graph, seconds: float) -> LiveRates:
    from torchserve_dag.server.connect import running
    from torchserve_dag.server.rates import watch

    with err.status(f"measuring {drawn.name} {drawn.version} for {seconds:g} s"):
        return watch(running(state).addresses.metrics, drawn.name, drawn.version, seconds)
