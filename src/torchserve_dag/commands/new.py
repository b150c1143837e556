"""`torchserve-dag new`: a project that serves at once."""

from __future__ import annotations

import importlib.util
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from torchserve_dag.archives import atomic
from torchserve_dag.commands.common import err, fail, failures, out

TEMPLATES = Path(__file__).parents[1] / "templates"

Template = Literal["text", "detect-classify", "torchserve"]

_HANDLERS = {"detect-classify": ("transformers_detector", "transformers_classifier")}
"""The ready handlers for hub models that each template copies, besides its own files."""


def new(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The project's folder, new or empty.")],
    *,
    template: Annotated[
        Template,
        typer.Option(
            help="text: a small model, trained at once. detect-classify: two models of the Hugging Face hub. "
            "torchserve: wraps an archive or a handler of your own."
        ),
    ] = "text",
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="For torchserve: a .mar, or the .py of a TorchServe handler."),
    ] = None,
) -> None:
    """Make a project: a handler with its card, a workflow, a test, and settings that serve."""
    from torchserve_dag.commands.add import copy_handler
    from torchserve_dag.server.shipped import shipped

    if (template == "torchserve") != (source is not None):
        fail("--from names the .mar or the .py that --template torchserve wraps: give both, or neither.")
    with failures():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            fail(f"{folder} is not empty: name a new folder.")
        _check_serves()
        values = {"project": folder.resolve().name}
        if source is not None:
            values |= _wrap(source, folder)
        _write(TEMPLATES / template.replace("-", "_"), folder, values)
        shutil.copyfile(TEMPLATES / "shared" / "gitignore", folder / ".gitignore")
        for name in ("config.properties", "log4j2.xml"):
            shutil.copyfile(shipped(name), folder / name)
        for name in _HANDLERS.get(template, ()):
            copy_handler(name, folder)
        if template == "text":
            _train(folder)
    out.print(f"[green]new[/]: {folder}, a project. Next:", highlight=False)
    for line in _next(folder):
        out.print(f"  {line}", soft_wrap=True)


def _check_serves() -> None:
    """Raises ModuleNotFoundError before anything is written, in an environment that cannot serve."""
    for package in ("torch", "model_archiver"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)


def _write(template: Path, folder: Path, values: dict[str, str]) -> None:
    """Write the template's files, with `$name` and the other `values` filled in, except in Python files."""
    for path in sorted(template.rglob("*")):
        if not path.is_file() or path.parent.name == "__pycache__":
            continue
        target = folder / path.relative_to(template)
        if path.name == "wrapped.yaml":
            target = target.with_name(f"{values['name']}.yaml")
        target.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text("utf-8")
        filled = string.Template(text).safe_substitute(values) if path.suffix in {".yaml", ".md"} else text
        atomic.write_text(target, filled)


def _wrap(source: Path, folder: Path) -> dict[str, str]:
    """Put a TorchServe archive into the new project: `source`, or one that is made from a handler's code."""
    from torchserve_dag.archives import mar

    if not source.is_file() or source.suffix not in {".mar", ".py"}:
        fail(f"{source} is neither a .mar nor the .py of a TorchServe handler.")
    workflows = folder / "workflows"
    if source.suffix == ".py":
        name, version = _name(source.stem), "1.0"
        (folder / "sources").mkdir(parents=True)
        workflows.mkdir()
        shutil.copyfile(source, folder / "sources" / source.name)
        command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", name, "--version", version]
        command += ["--handler", str(source), "--export-path", str(workflows)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (our own arguments)
        if done.returncode:
            fail(f"torch-model-archiver refuses {source}: {done.stderr.strip().splitlines()[-1]}")
        return {"name": name, "version": version, "archive": f"{name}.mar"}
    try:
        name, version = mar.name_and_version(source)
    except (mar.BadArchiveError, ValueError, KeyError, TypeError):
        fail(f"{source} is not an archive that torch-model-archiver made.")
    workflows.mkdir(parents=True)
    shutil.copyfile(source, workflows / source.name)
    return {"name": _name(name), "version": _version(version), "archive": source.name}


def _name(text: str) -> str:
    """`text` as a valid name of a workflow: `resnet-18` becomes `resnet_18`."""
    name = re.sub(r"[^a-z0-9_]+", "_", text.lower()).strip("_")
    return name if name[:1].isalpha() else f"model_{name}".rstrip("_")


def _version(text: str) -> str:
    return text if re.fullmatch(r"[0-9]+(\.[0-9]+)*", text) else "1.0"


def _train(folder: Path) -> None:
    """Train the template's model, and write the hash of its weights into its card."""
    from torchserve_dag.archives.cards import update
    from torchserve_dag.runtime.project.folders import Project

    with err.status("training a small model", spinner="line"):
        done = subprocess.run(
            [sys.executable, "train.py"], cwd=folder, capture_output=True, text=True, check=False
        )  # fmt: skip
    if done.returncode:
        fail(f"python train.py in {folder} failed: {(done.stderr.strip().splitlines() or ['it says nothing'])[-1]}")
    project = Project(folder)
    update(project, [project.handler("language")])


def _next(folder: Path) -> list[str]:
    """The commands to run next, as the project's README has them."""
    block, *_ = re.findall(r"```sh\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    return [f"cd {folder}", *block.splitlines()]
