"""What an archive was built from: the commit, the packages' versions, the sha256 of weights and of own modules."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

from torchserve_dag.runtime.project import requirements as required

OWN = "torchserve-dag"
PACKAGES = (OWN, "torch", "torchserve", "transformers", "pillow", "numpy", "safetensors")
"""Packages whose versions `build.json` names, besides those that a project requires."""


def inputs(
    root: Path, weights: dict[str, str], modules: dict[str, str], requirements: Iterable[str]
) -> dict[str, object]:
    """The `inputs` of an archive's `build.json`. `weights` and `modules`: the SHA-256 of each, by name."""
    return {
        "commit": commit(root),
        "packages": packages() | required.versions(requirements),
        "weights": dict(sorted(weights.items())),
        "modules": modules,
    }


def commit(root: Path) -> str:
    """The commit that `root` is at, with `+uncommitted` where its files differ; `unknown` without git."""
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return "unknown"
    changes = _git(root, "status", "--porcelain", "--", ".")
    return head if changes == "" else f"{head}+uncommitted"


def packages() -> dict[str, str]:
    """The versions of what is installed here, Python's own among them."""
    return {"python": platform.python_version()} | required.versions(PACKAGES)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603 (fixed arguments)
            ["git", "-C", str(root), *arguments],  # noqa: S607 (whichever git the user has)
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
