"""The machine and the packages of a benchmark: its figures are comparable only with the same ones."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from torchserve_dag.bench.benchmark_file import cores

_PACKAGES = ("torchserve-dag", "torch", "torchserve", "transformers", "pillow", "numpy", "grpcio")


@dataclass(frozen=True, slots=True)
class Machine:
    processor: str
    cores: int
    """The cores that the benchmark may use."""
    memory_gb: float
    system: str
    python: str
    packages: dict[str, str]


def this() -> Machine:
    return Machine(
        _processor(),
        cores(),
        psutil.virtual_memory().total / 1e9,
        f"{platform.system()} {platform.release()}",
        platform.python_version(),
        {name: found for name in _PACKAGES if (found := _version(name))},
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text("utf-8")) if info.is_file() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
