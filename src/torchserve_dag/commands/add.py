"""`torchserve-dag add`: a ready handler, copied into the project, or the environment of an engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Literal

import typer

from torchserve_dag.commands.common import ProjectOption, err, fail, failures, out, project_root

add = typer.Typer(
    help="Copy ready parts into the project, or install an engine of language models.", no_args_is_help=True
)


@add.callback()
def _group() -> None:
    """Copy ready parts into the project, or install an engine of language models."""


@add.command("handler")
def handler(
    name: Annotated[
        str | None, typer.Argument(help="The handler to copy. Without it, list the ready handlers.")
    ] = None,
    *,
    project: ProjectOption = None,
) -> None:
    """Copy a handler for published models into handlers/, with its card: photos, texts, language models."""
    import yaml

    from torchserve_dag.runtime.data import plain
    from torchserve_dag.server.shipped import ready_handlers, shipped

    known = ready_handlers()
    if name is None:
        for ready in known:
            card = yaml.safe_load((shipped("handlers") / f"{ready}.yaml").read_text("utf-8"))["card"]
            out.print(f"[bold]{ready}[/]  {card['does']}", soft_wrap=True)
        return
    if name not in known:
        fail(f'There is no ready handler "{name}"; {plain.did_you_mean(name, known)}.')
    with failures():
        root = project_root(project)
        copy_handler(name, root)
    out.print(f"[green]added[/] handlers/{name}.py and handlers/{name}.yaml")


@add.command("engine")
def engine(
    name: Annotated[Literal["vllm"], typer.Argument(help="The engine.")],
    *,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(help="What it is to compute on; auto: a GPU where there is one."),
    ] = "auto",
    again: Annotated[bool, typer.Option("--again", help="Install it again, even if it is there.")] = False,
) -> None:
    """Install an engine that needs an environment of its own: other packages than this one, in other versions."""
    from torchserve_dag.runtime.compute.placement import find_device
    from torchserve_dag.runtime.models.language.vllm import environment as vllm_environment
    from torchserve_dag.server import vllm_installation

    kind = find_device(device).type if device == "auto" else device
    folder = vllm_environment.environment(kind)
    with failures():
        if not again and (folder / vllm_environment.DONE).is_file():
            out.print(f"{name} is there already: {folder}", soft_wrap=True)
            return
        with err.status(f"installing {vllm_environment.PACKAGES[kind]}", spinner="line") as shown:
            vllm_installation.install(folder, kind, shown.update)
    out.print(f"[green]added[/] {vllm_environment.PACKAGES[kind]} in {folder}", soft_wrap=True)


def copy_handler(name: str, root: Path) -> None:
    """Copy a ready handler's two files into `root`. Never overwrites a file."""
    from torchserve_dag.server.shipped import shipped

    (root / "handlers").mkdir(exist_ok=True)
    for suffix in (".py", ".yaml"):
        target = root / "handlers" / f"{name}{suffix}"
        if target.exists():
            fail(f"{target} exists already; move it away first.")
    for suffix in (".py", ".yaml"):
        shutil.copyfile(shipped("handlers") / f"{name}{suffix}", root / "handlers" / f"{name}{suffix}")
