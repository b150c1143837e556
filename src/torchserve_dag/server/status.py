"""What the running server serves: versions, workers, queues, and what an archive says about its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from torchserve_dag.archives.archive import Archive, ModelVersion, copies, read_store
from torchserve_dag.archives.protocol import why_not_spoken
from torchserve_dag.clients import Client, VersionInfo, WorkerInfo
from torchserve_dag.clients.models import version_info
from torchserve_dag.server import releases_file
from torchserve_dag.server.processes import runs
from torchserve_dag.server.selection import Remark, standing
from torchserve_dag.server.state import ServerRecord, State
from torchserve_dag.server.supervised import Supervised


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    id: str
    pid: int
    ready: bool
    """Whether its model is loaded, and its process runs."""
    device: str
    memory_mb: int | None
    """Resident memory; None if the process has ended."""


@dataclass(frozen=True, slots=True)
class VersionStatus:
    name: str
    version: str
    state: str
    """`ready`, `starting` or `stopped`."""
    hash: str
    """A short hash of the content of its archive."""
    default: bool
    batch_size: int
    pending: int
    """Requests that wait for a worker."""
    workers: list[WorkerStatus]


@dataclass(frozen=True, slots=True)
class Status:
    pid: int
    """TorchServe's; of the direct host the keeper's."""
    addresses: dict[str, str]
    versions: list[VersionStatus]
    remarks: list[Remark]
    """What is not as it was decided, and what nobody decided on."""


def status(state: State, record: ServerRecord, client: Client) -> Status:
    """The server and every version that it serves. Raises ServingError, CheckError."""
    where, archives = record.addresses, copies(state.archives)
    infos = [(model.name, version) for model in client.models() for version in model.versions]
    versions = [_version(name, info, archives) for name, info in infos]
    served = {key: archives.get(key) for version in versions if (key := (version.name, version.version))}
    remarks = standing(read_store(Path(record.store)), releases_file.read(state.root), served)
    remarks += [Remark("failed", f"{name} {info.version}", info.failure) for name, info in infos if info.failure]
    supervised = Supervised(state).record("keeper")
    pid = record.pid or (supervised.pid if supervised else 0)
    return Status(pid, {name: getattr(where, name) for name in where.__slots__}, versions, remarks)


def about(client: Client, name: str, version: str | None = None) -> Mapping[str, Any]:
    """What an archive's `build.json` says: its card, its inputs, its graph, the protocol that it speaks.

    If this package does not speak that protocol, a sentence in its place says what to do. Of another archive: what
    TorchServe says. Raises ServingError.
    """
    whole = client.describe(name, version)
    described = whole.get("customizedMetadata")
    if not isinstance(described, dict) or not described:
        known = version_info(whole, default=False)
        return {
            "name": whole["modelName"],
            "version": known.version,
            "built by": "another tool than torchserve-dag: it has no card and no graph",
            "state": known.state,
            "archive": known.archive,
            "workers": {"ready": sum(one.ready for one in known.workers), "at least": known.min_workers},
            "batch": {"most": known.batch_size, "delay_ms": known.max_batch_delay_ms},
            "timeout_s": known.response_timeout_s,
            "queue": known.queued,
        }
    refusal = why_not_spoken(described) if "inputs" in described else None
    return described | ({"protocol": refusal} if refusal else {})


def _version(name: str, info: VersionInfo, archives: Mapping[ModelVersion, Archive]) -> VersionStatus:
    # TorchServe learns late, or never, that the process of a worker has ended.
    info = replace(info, workers=tuple(replace(one, ready=one.ready and runs(one.pid)) for one in info.workers))
    workers = [_worker(worker) for worker in info.workers]
    archive = archives.get((name, info.version))
    content = archive.hash if archive else ""
    return VersionStatus(name, info.version, info.state, content, info.default, info.batch_size, info.queued, workers)


def _worker(info: WorkerInfo) -> WorkerStatus:
    return WorkerStatus(info.id, info.pid, info.ready, "gpu" if info.gpu else "cpu", _memory_mb(info.pid))


def _memory_mb(pid: int) -> int | None:
    # TorchServe reports it only once a minute, and 0 in the first minute.
    try:
        return round(psutil.Process(pid).memory_info().rss / 2**20) if pid > 0 else None
    except psutil.Error:
        return None
