"""A handler, loaded and warm."""

from __future__ import annotations

from torchserve_dag.runtime.compute.placement import Placement, find_device
from torchserve_dag.runtime.data.source import Source
from torchserve_dag.runtime.models.stages import Stages
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.project.handler_file import HandlerFile


def load_handler(
    project: Project,
    file: Source[HandlerFile],
    *,
    device: str | None = None,
    gpu: int | None = None,
    batch: int | None = None,
) -> Stages:
    """A project's handler, loaded and warm. `device` and `batch` override what its file says.

    Raises CheckError for a file that is wrong, ValueError for a device that is not there.
    """
    run = file.value.run
    kind = project.handler_class(file)
    settings = project.settings(file, kind)
    placement = Placement(find_device(device or run.device, gpu), run.precision, run.channels_last, run.runtime)
    handler = kind()
    handler.load(project.weights, settings, placement)
    stages = Stages(file.value.name, handler, placement, run.micro_batch, file.value.serve.timeout_s)
    stages.warm_up(batch or run.batch)
    return stages
