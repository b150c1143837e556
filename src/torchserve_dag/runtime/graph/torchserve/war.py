"""The files of a finished TorchServe `.war`, unpacked."""

from __future__ import annotations

import functools
import json
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.runtime.data import unzip
from torchserve_dag.runtime.data.source import CheckError, Problem


@dataclass(frozen=True, slots=True)
class War:
    spec: Path
    functions: Path


def read_war(path: Path) -> War:
    """The workflow in a `.war`. Raises CheckError."""
    try:
        folder = _unpacked(path, path.stat().st_mtime_ns)
        workflow = json.loads((folder / "WAR-INF" / "MANIFEST.json").read_bytes())["workflow"]
        war = War(unzip.inside(folder, workflow["specFile"]), unzip.inside(folder, workflow["handler"]))
    except FileNotFoundError as error:
        what = "there is no such file" if error.filename == str(path) else "it holds no WAR-INF/MANIFEST.json"
        raise CheckError([Problem(str(path), 1, what)]) from None
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"it is not an archive of torch-workflow-archiver's: {type(error).__name__}: {error}"
        raise CheckError([Problem(str(path), 1, what)]) from None
    for file in (war.spec, war.functions):
        if not file.is_file():
            raise CheckError([Problem(str(path), 1, f"it holds no {file.name}, which its manifest names")])
    return war


_folders: list[tempfile.TemporaryDirectory[str]] = []
"""The folders of unpacked `.war` files. They exist until the process ends: functions may read other files in them."""


@functools.cache
def _unpacked(path: Path, changed_ns: int) -> Path:  # noqa: ARG001 (a file that has changed is unpacked again)
    folder = tempfile.TemporaryDirectory(prefix=f"{path.stem}-")
    _folders.append(folder)
    unzip.extract(path, Path(folder.name))
    return Path(folder.name)
