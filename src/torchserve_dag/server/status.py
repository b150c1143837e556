"""What the running server serves: versions, workers, queues, and what an archive says about its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from torchserve_dag.archives.protocol import why_not_spoken
from torchserve_dag.clients import Client, VersionInfo, WorkerInfo
from torchserve_dag.server.state import TorchServeProcess


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    id: str
    pid: int
    ready: bool
    device: str
    memory_mb: int | None
    """Resident memory; None if the process has ended."""


@dataclass(frozen=True, slots=True)
class VersionStatus:
    name: str
    version: str
    state: str
    """`ready`, `starting` or `stopped`."""
    default: bool
    batch_size: int
    pending: int
    """Requests that wait for a worker."""
    workers: list[WorkerStatus]


@dataclass(frozen=True, slots=True)
class Status:
    pid: int
    addresses: dict[str, str]
    versions: list[VersionStatus]


def status(record: TorchServeProcess, client: Client) -> Status:
    """The server and every version that it serves. Raises ServingError."""
    where = record.addresses
    versions = [_version(model.name, version) for model in client.models() for version in model.versions]
    return Status(record.pid, {name: getattr(where, name) for name in where.__slots__}, versions)


def about(client: Client, name: str, version: str | None = None) -> Mapping[str, Any]:
    """What an archive's `build.json` says: its card, its inputs, its graph, the protocol that it speaks.

    If this package does not speak that protocol, a sentence in its place says what to do. Raises ServingError.
    """
    described = client.describe(name, version).get("customizedMetadata")
    if not isinstance(described, dict):
        return {}
    refusal = why_not_spoken(described) if "inputs" in described else None
    return described | ({"protocol": refusal} if refusal else {})


def _version(name: str, info: VersionInfo) -> VersionStatus:
    workers = [_worker(worker) for worker in info.workers]
    return VersionStatus(name, info.version, info.state, info.default, info.batch_size, info.queued, workers)


def _worker(info: WorkerInfo) -> WorkerStatus:
    return WorkerStatus(info.id, info.pid, info.ready, "gpu" if info.gpu else "cpu", _memory_mb(info.pid))


def _memory_mb(pid: int) -> int | None:
    # TorchServe reports it only once a minute, and 0 in the first minute.
    try:
        return round(psutil.Process(pid).memory_info().rss / 2**20) if pid > 0 else None
    except psutil.Error:
        return None
