"""A module of this package in a process of its own: one value goes in as JSON, another comes out.

`call` is the caller's side. The module calls `serve` where it is run with `python -m`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torchserve_dag.runtime.data import plain

T = TypeVar("T")


class ModuleFailedError(Exception):
    """The module gave no result. The message is the last line of its standard error, or says that it took too long."""


def call(module: str, argument: object, result: type[T], timeout_s: float, log: Path | None = None) -> T:
    """Run the module and return its result. What it writes to standard error is appended to `log`.

    Raises ModuleFailedError.
    """
    command = [sys.executable, "-m", module]
    request = json.dumps(plain.flatten(argument)).encode()
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=timeout_s, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        _append(log, error.stderr or b"")
        raise ModuleFailedError(f"it took longer than {timeout_s:g} s") from None
    _append(log, done.stderr)
    output = done.stdout.splitlines()
    if done.returncode or not output:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ModuleFailedError(lines[-1].strip() if lines else "it gave no reason")
    return plain.build(result, json.loads(output[-1]))


def serve(argument: type[T], compute: Callable[[T], Any]) -> None:
    """Read the argument from standard input, pass it to `compute`, and write the result to standard output."""
    result = compute(plain.build(argument, json.load(sys.stdin)))
    sys.stdout.write(json.dumps(plain.flatten(result)) + "\n")


def _append(log: Path | None, text: bytes) -> None:
    if log:
        with log.open("ab") as file:
            file.write(text)
