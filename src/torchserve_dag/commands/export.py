"""`torchserve-dag export`: write a language model for the engine `onnxruntime`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from torchserve_dag.commands.common import ProjectOption, fail, failures, out, project_root


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub model's folder below weights/.")],
    target: Annotated[
        str | None, typer.Argument(metavar="[TARGET]", help="The new folder below weights/; by default MODEL-onnx.")
    ] = None,
    *,
    project: ProjectOption = None,
) -> None:
    """Write a language model as ONNX, for the engine onnxruntime: it takes minutes.

    It is kept only if it writes the same tokens as the model.
    """
    from torchserve_dag.runtime.models.language.onnxruntime import export as onnx_export

    for package in ("onnxruntime_genai", "onnxscript"):
        if find_spec(package) is None:
            fail(f"export needs {package}, which is not installed: pip install 'torchserve-dag[onnxruntime]'")
    with failures():
        weights = project_root(project) / "weights"
        name = target or f"{model}-onnx"
        if not (weights / model / "config.json").is_file():
            fail(f"weights/{model} is not the folder of a hub model: it has no config.json.")
        try:
            onnx_export.export(weights / model, weights / name)
        except ValueError as error:
            fail(f"weights/{model}: {error}.")
    out.print(f"wrote weights/{name}: {_megabytes(weights / name):,} MB; write model: {name}, engine: onnxruntime")


def _megabytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir()) // 1_000_000
