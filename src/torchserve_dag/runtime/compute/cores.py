"""The machine's cores: how many this process may use, and how its threads share them."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path


def cores() -> int:
    """The cores that this process may use: those of its CPU affinity, or fewer where the container has a quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("utf-8").split()
        return max(1, min(bound, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return bound


def share_cores(lanes: int) -> None:
    """Give each of `lanes` threads its share of the cores: torch has one number of threads for the whole process.

    One core for each thread had the highest throughput; the figures are in docs/decisions/0008-lanes.md. Without effect
    where nobody has imported torch.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(max(1, cores() // lanes))


_here = threading.local()


def set_alone(alone: bool) -> None:  # noqa: FBT001 (the engine calls it with one value)
    """Set whether this thread may use every core for its next computation, because the other threads are idle."""
    _here.alone = alone


def alone() -> bool:
    """Whether this thread may use every core."""
    return getattr(_here, "alone", False)
