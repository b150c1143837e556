"""Where the project is that an archive is served from: what is too large or too new for an archive lies there."""

from __future__ import annotations

import os
from pathlib import Path

STATE = "TORCHSERVE_DAG_STATE"
"""The environment variable with the state folder, which lies in the project: what `up` starts has it."""


def home_of(root: Path) -> Path:
    """The project that an unpacked archive is served from; `root` itself where that is the project, or nobody says."""
    state = os.environ.get(STATE)
    return Path(state).parent if state and (root / "build.json").is_file() else root
