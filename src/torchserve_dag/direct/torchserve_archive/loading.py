"""An unpacked archive of TorchServe's, loaded as TorchServe's worker loads it."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from torchserve_dag.direct.torchserve_archive.handler import ForeignHandler
from torchserve_dag.direct.torchserve_archive.service import ForeignService
from torchserve_dag.direct.torchserve_archive.settings import read_settings
from torchserve_dag.runtime.compat import archive, entry_point
from torchserve_dag.runtime.compat.context import Context

logger = logging.getLogger(__name__)


def load(folder: Path, gpu: int | None) -> ForeignService:
    """Load the model of an unpacked archive, on GPU number `gpu` if it uses one.

    To be called once in a process, on its main thread, which then calls `run`. The folder becomes the process's working
    directory, and the first of its path. Raises ValueError for an archive that cannot be served here, and whatever
    loading raises.
    """
    folder = folder.absolute()
    settings = read_settings(folder)
    if settings.requirements:
        logger.warning(
            "%s %s: the packages of its %s are not installed by the direct host; what is missing, install beforehand",
            settings.name,
            settings.version,
            settings.requirements,
        )
    _live_in(folder)
    context = Context(settings.name, folder, None if settings.on_cpu else gpu, settings.batch)
    try:
        handle = entry_point.load(settings.handler, folder, context)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ts":
            raise
        what = (
            f"{settings.name} {settings.version} imports ts, which is TorchServe's own package, and not installed here"
        )
        raise RuntimeError(f"{what}: pip install 'torchserve-dag[serve]'.") from error
    return ForeignService(settings, ForeignHandler(settings.name, handle, context), streams=archive.streams(folder))


def _live_in(folder: Path) -> None:
    """As TorchServe starts a worker. Programs that the handler starts import from the folder, too."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
