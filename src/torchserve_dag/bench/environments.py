"""A virtual environment for each system with pinned packages; torch and the rest come from the running environment."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torchserve_dag
from torchserve_dag.bench.errors import BenchError
from torchserve_dag.bench.programs import Program

_STAMP = "bench-stamp"
_LIMIT_S = 900


def python_for(program: Program, folder: Path) -> Path:
    """The Python that runs a program; its environment is made below `folder` if it is missing.

    Raises BenchError if pip fails; pip's output is in `folder`/NAME.log.
    """
    if not program.dependencies:
        return Path(sys.executable)
    home = folder / program.key
    python, stamp, wanted = home / "bin" / "python", home / _STAMP, _stamp(program)
    if stamp.is_file() and stamp.read_text("utf-8") == wanted:
        return python
    shutil.rmtree(home, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{program.key}.log"
    _run([sys.executable, "-m", "venv", str(home)], log, program)
    (site,) = (home / "lib").glob("python*/site-packages")
    # Before pip runs, so that pip sees the shared packages. The pinned packages come first: a .pth file adds folders at
    # the end of the path.
    (site / "bench.pth").write_text("".join(f"{path}\n" for path in _shared()), "utf-8")
    pip = [str(python), "-m", "pip", "install", "--no-compile", "--disable-pip-version-check"]
    _run([*pip, *program.dependencies], log, program)
    stamp.write_text(wanted, "utf-8")
    return python


def _shared() -> list[str]:
    """The folders of the running environment's packages, and of this package, which may be an editable install."""
    return [sysconfig.get_path("purelib"), str(Path(torchserve_dag.__file__).parents[1])]


def _stamp(program: Program) -> str:
    made_of = json.dumps([sys.version, _shared(), program.dependencies])
    return hashlib.sha256(made_of.encode()).hexdigest()


def _run(words: list[str], log: Path, program: Program) -> None:
    with log.open("ab") as file:
        try:
            done = subprocess.run(  # noqa: S603 (our own Python)
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise BenchError(f"{program.name}: no environment within {_LIMIT_S} s; see {log}.") from None
    if done.returncode:
        raise BenchError(f"{program.name}: its environment cannot be made; see {log}.")
