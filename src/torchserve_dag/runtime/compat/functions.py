"""A TorchServe workflow's Python file, whose functions are handlers: its folder, and what is wrong with it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchserve_dag.runtime.compat.process import Process

_IMPORT_S = 300
"""How long importing the file may take."""


@dataclass(frozen=True, slots=True)
class FileCheck:
    """What is wrong with a file."""

    what: str = ""
    """Why it cannot be imported. Empty where it can be."""
    line: int | None = None
    needs_a_file: bool = False
    """Whether a module is missing."""
    missing: Sequence[str] = field(default_factory=list)
    """The functions that it does not have."""


def folder_of(file: Path) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    """The folder in which a file's functions run, and the object that deletes it, if it is a copy.

    In an unpacked `.war` all files belong to the workflow. Elsewhere other files belong to other workflows, so the file
    is copied into a folder of its own.
    """
    if (file.parent / "WAR-INF").is_dir():
        return file.parent.absolute(), None
    folder = tempfile.TemporaryDirectory(prefix=f"{file.stem}-", ignore_cleanup_errors=True)
    shutil.copy(file, folder.name)
    return Path(folder.name), folder


def check_functions(file: Path, functions: Sequence[str]) -> FileCheck:
    """Import a file in a process of its own, and look for its functions. Raises ProcessError if that process ends."""
    folder, copy = folder_of(file)
    process = Process(file.name, folder, {"module": file.stem, "functions": list(functions)})
    try:
        return FileCheck(**json.loads(process.loaded(_IMPORT_S)))
    finally:
        process.end()
        if copy:
            copy.cleanup()
