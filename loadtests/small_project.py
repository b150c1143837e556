"""A project of a few functions, for the programs that do something to its server."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOL = (sys.executable, "-m", "torchserve_dag")


def make(root: Path, files: dict[str, str], names: Sequence[str] = ()) -> None:
    """Write the files, beside the settings of TorchServe that this repository has, and build archives: of `names`, or
    all.
    """
    for name in ("config.properties", "log4j2.xml"):
        shutil.copy(ROOT / name, root)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text.lstrip())
    tool(root, "build", *names)


def tool(root: Path, *words: str) -> str:
    """What `torchserve-dag WORDS` prints in a project. It may fail at nothing but `down`."""
    done = subprocess.run([*TOOL, *words], cwd=root, capture_output=True, text=True, check=False)  # noqa: S603 (our own)
    if done.returncode and words[0] != "down":
        raise SystemExit(f"torchserve-dag {' '.join(words)}: {done.stderr or done.stdout}")
    return done.stdout
