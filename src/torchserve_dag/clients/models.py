"""A server's models, from the management API's JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

DIGITS = "0123456789"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    id: str
    ready: bool
    """Whether the worker has loaded the model."""
    pid: int
    gpu: bool


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """One version of a model, as it is served."""

    version: str
    default: bool
    """Whether this version answers requests that name no version."""
    workers: tuple[WorkerInfo, ...]
    min_workers: int
    max_workers: int
    batch_size: int
    max_batch_delay_ms: int
    response_timeout_s: int
    queued: int
    """Requests that wait for a worker."""
    archive: str
    failure: str = ""
    """Why the direct host cannot serve it, once its workers have failed again and again."""

    @property
    def ready(self) -> bool:
        """Whether at least `min_workers` workers, and at least one, have loaded the model."""
        return sum(worker.ready for worker in self.workers) >= max(1, self.min_workers)

    @property
    def state(self) -> str:
        """`ready`, `starting` (fewer workers ready than `min_workers`) or `stopped` (no workers configured)."""
        return "ready" if self.ready else "starting" if self.min_workers else "stopped"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model and its versions, in the order of their numbers."""

    name: str
    versions: tuple[VersionInfo, ...]

    @property
    def default(self) -> VersionInfo:
        return next(version for version in self.versions if version.default)


def model_info(name: str, descriptions: list[dict[str, Any]], default: str) -> ModelInfo:
    """A model from TorchServe's descriptions of all its versions."""
    versions = [version_info(described, default=described["modelVersion"] == default) for described in descriptions]
    return ModelInfo(name, tuple(sorted(versions, key=lambda version: version_key(version.version))))


def version_info(described: Mapping[str, Any], *, default: bool) -> VersionInfo:
    """A version from TorchServe's description of it."""
    return VersionInfo(
        version=described["modelVersion"],
        default=default,
        workers=tuple(_worker(worker) for worker in described["workers"]),
        min_workers=described["minWorkers"],
        max_workers=described["maxWorkers"],
        batch_size=described["batchSize"],
        max_batch_delay_ms=described["maxBatchDelay"],
        response_timeout_s=described["responseTimeout"],
        queued=described["jobQueueStatus"]["pendingRequests"],
        archive=described["modelUrl"],
        failure=described.get("failure", ""),
    )


def _worker(worker: Mapping[str, Any]) -> WorkerInfo:
    return WorkerInfo(worker["id"], worker["status"] == "READY", worker["pid"], worker["gpu"])


def version_key(version: str) -> tuple[Any, ...]:
    """The key to sort versions by, one total order of all strings.

    The longest part from the beginning that PEP 440 knows counts first (2.0rc1 before 2.0, 2.0 before 2.0.post1, v9
    before v10), then the rest in natural order (2024-9-1 before 2024-10-1). Versions without such a part come first.
    """
    for end in reversed([match.end() for match in re.finditer("[A-Za-z0-9]+", version)]):
        try:
            known = (Version(version[:end]),)
        except ValueError:  # InvalidVersion, or a number of more digits than int reads
            continue
        return (known, _natural(version[end:]), version)
    return ((), _natural(version), version)


def _natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Numbers by their value, and before other text."""
    parts = re.findall("[0-9]+|[^0-9]+", text)  # not isdigit, which has digits that are no numbers: ²
    return tuple((0, len(number := part.lstrip("0")), number) if part[0] in DIGITS else (1, 0, part) for part in parts)
