"""What the direct host's management API does, as TorchServe's does it; `management_app.py` has its HTTP side."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

from torchserve_dag.archives import mar
from torchserve_dag.archives.archive import ModelVersion, UnusableArchiveError, copy, read_archive
from torchserve_dag.archives.protocol import why_not_hosted
from torchserve_dag.clients.models import version_key
from torchserve_dag.front_door.door import Door, Traffic
from torchserve_dag.front_door.splits import ServedVersion
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.hosted import MAX_WORKERS, Hosted, HostedFile, HostedVersion, hosted_version
from torchserve_dag.server.properties import read as read_properties
from torchserve_dag.server.state import State
from torchserve_dag.stack.workers import VersionState, Workers

logger = logging.getLogger(__name__)

PAGE = 100
POLL_S = 0.1


class CallError(Exception):
    """A management call that fails, with its HTTP status and TorchServe's name for the failure."""

    def __init__(self, status: HTTPStatus, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class Management:
    """What the management API does. Each method raises CallError."""

    def __init__(self, state: State, workers: Workers) -> None:
        self._state, self._workers, self._file, self._door = state, workers, HostedFile(state), Door(state)

    def listed(self, limit: int, page: int) -> dict[str, Any]:
        urls = {one.hosted.model: one.hosted.archive for one in self._workers.states() if one.default}
        names, limit = sorted(urls), min(max(1, limit), PAGE)
        shown = names[page : page + limit]
        found: dict[str, Any] = {"models": [{"modelName": name, "modelUrl": urls[name]} for name in shown]}
        return {"nextPageToken": str(page + limit), **found} if page + limit < len(names) else found

    def described(self, name: str, version: str | None, *, customized: bool) -> list[dict[str, Any]]:
        """Of the default version; of one, or of `all`."""
        every = [one for one in self._workers.states() if one.hosted.model == name]
        if not every:
            raise CallError(HTTPStatus.NOT_FOUND, "ModelNotFoundException", f"Model not found: {name}")
        if version != "all":
            every = [one for one in every if (one.hosted.version == version if version else one.default)]
        if not every:
            message = f"Model version: {version} does not exist for model: {name}"
            raise CallError(HTTPStatus.NOT_FOUND, "ModelVersionNotFoundException", message)
        every.sort(key=lambda one: version_key(one.hosted.version))
        return [self._description(one, customized=customized) for one in every]

    def take(self, file: str) -> str:
        """Copy an archive from the project's store; the file name of the server's copy."""
        record = self._state.record()
        path = Path(record.store if record else "") / file
        if "/" in file or not path.is_file():
            message = f"{file} is not in {path.parent}: name a file of the model store."
            raise CallError(HTTPStatus.NOT_FOUND, "ModelNotFoundException", message)
        try:
            return copy(read_archive(path), self._state.archives).path.name
        except UnusableArchiveError as error:
            raise CallError(HTTPStatus.BAD_REQUEST, "InvalidModelException", f"{file} {error}.") from None

    async def route_when_ready(self, key: ModelVersion) -> None:
        """Have Envoy route requests to a version that was registered at a port, once it has a worker."""
        try:
            await self.settled(key)
            await asyncio.to_thread(self._route_to, key)
        except CallError as error:
            logger.warning("%s is not routed to: %s", "/".join(key), error)

    def _route_to(self, key: ModelVersion) -> None:
        one = self._file.read().of(key)
        if one is None:  # it was unregistered meanwhile
            return
        served = ServedVersion.of(*key, one.timeout_s, self._state.archives / one.archive)
        default = self._file.read().defaults.get(one.model, one.version)

        def change(now: Traffic) -> Traffic:
            others = tuple(one for one in now.served if (one.model, one.version) != key)
            return replace(now, served=(*others, served), defaults={key[0]: default, **now.defaults})

        self._route(change)

    def _route(self, change: Callable[[Traffic], Traffic]) -> None:
        try:
            self._door.change(change)
        except (ServerError, OSError) as error:
            raise CallError(HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableException", str(error)) from None

    def register(self, file: str, workers: int | None = None) -> tuple[ModelVersion, str]:
        """Serve one of the server's copies of archives. Returns the version, and what to say."""
        path = self._state.archives / file
        if "/" in file or not path.is_file():
            message = f"{file} is not among the server's copies of archives: use torchserve-dag serve NAME/VERSION."
            raise CallError(HTTPStatus.NOT_FOUND, "ModelNotFoundException", message)
        try:
            archive = read_archive(path)
        except UnusableArchiveError as error:
            raise CallError(HTTPStatus.BAD_REQUEST, "InvalidModelException", f"{file} {error}.") from None
        if why := why_not_hosted(path):
            raise CallError(HTTPStatus.BAD_REQUEST, "InvalidModelException", why)
        one = hosted_version(archive, read_properties(self._state.config))
        if workers is not None:
            one = replace(one, workers=min(workers, MAX_WORKERS))
        if self._file.read().of(one.key):
            message = f"Model version {one.version} is already registered for model {one.model}"
            raise CallError(HTTPStatus.CONFLICT, "ConflictStatusException", message)
        self._change(lambda now: _with(now, one))
        return one.key, f'Model "{one.model}" Version: {one.version} registered with {one.workers} initial workers'

    def unregister(self, name: str, version: str | None) -> str:
        one = self._one(name, version)
        others = [other.version for other in self._file.read().versions if other.model == name and other != one]
        if self._file.read().defaults.get(name) == one.version and others:
            message = f"Cannot remove default version for model {name}"
            raise CallError(HTTPStatus.FORBIDDEN, "InvalidModelVersionException", message)
        self._route(lambda now: replace(now, served=tuple(v for v in now.served if (v.model, v.version) != one.key)))
        self._change(lambda now: _without(now, one))
        return f'Model "{name}" unregistered'

    def scale(self, name: str, version: str | None, workers: int) -> ModelVersion:
        one = self._one(name, version)
        if not 0 <= workers <= MAX_WORKERS:
            message = f"A version has 0 to {MAX_WORKERS} workers, not {workers}."
            raise CallError(HTTPStatus.BAD_REQUEST, "BadRequestException", message)
        self._change(lambda now: _with(now, replace(one, workers=workers)))
        return one.key

    def set_default(self, name: str, version: str) -> str:
        self._one(name, version)
        self._change(lambda now: replace(now, defaults={**now.defaults, name: version}))
        self._route(lambda now: replace(now, defaults={**now.defaults, name: version}))
        return f'Default version successfully updated for model "{name}" to "{version}"'

    def restart(self, name: str, version: str | None) -> str:
        one = self._one(name, version)
        self._workers.restart(one.key)
        return f"{name}/{one.version}: its workers are replaced one by one"

    async def settled(self, key: ModelVersion) -> None:
        """Wait until a version has the workers that it is to have."""
        while found := next((o for o in await asyncio.to_thread(self._workers.states) if o.hosted.key == key), None):
            ready = sum(worker.stage == "ready" for worker in found.workers)
            if found.failure:
                message = f"The workers of {'/'.join(key)} do not start: {found.failure}"
                raise CallError(HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerException", message)
            if ready == found.hosted.workers == len(found.workers):
                return
            await asyncio.sleep(POLL_S)

    def why_unhealthy(self) -> str:
        """Which versions have no worker that is ready; empty if none."""
        missing = [
            "/".join(one.hosted.key)
            for one in self._workers.states()
            if one.hosted.workers and not any(worker.stage == "ready" for worker in one.workers)
        ]
        return f"no worker is ready of {', '.join(missing)}" if missing else ""

    def _one(self, name: str, version: str | None) -> HostedVersion:
        hosted = self._file.read()
        if not any(one.model == name for one in hosted.versions):
            raise CallError(HTTPStatus.NOT_FOUND, "ModelNotFoundException", f"Model not found: {name}")
        wanted = version or hosted.defaults.get(name, "")
        one = hosted.of((name, wanted))
        if one is None:
            message = f"Model version: {wanted} does not exist for model: {name}"
            raise CallError(HTTPStatus.NOT_FOUND, "ModelVersionNotFoundException", message)
        return one

    def _change(self, change: Callable[[Hosted], Hosted]) -> None:
        try:
            self._file.change(change)
        except ServerError as error:
            raise CallError(HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableException", str(error)) from None

    def _description(self, seen: VersionState, *, customized: bool) -> dict[str, Any]:
        one = seen.hosted
        fields = {
            "modelName": one.model,
            "modelVersion": one.version,
            "modelUrl": one.archive,
            "runtime": "python",
            "minWorkers": one.workers,
            "maxWorkers": one.workers,
            "batchSize": one.batch_size,
            "maxBatchDelay": one.max_batch_delay_ms,
            "responseTimeout": one.timeout_s,
            "startupTimeout": one.startup_s,
            "loadedAtStartup": False,
            "workers": [
                {
                    "id": worker.id,
                    "startTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(worker.since)),
                    "status": worker.stage.upper(),
                    "memoryUsage": round(worker.memory_mb * 2**20),
                    "pid": worker.pid,
                    "gpu": worker.gpu is not None,
                    "gpuUsage": "N/A",
                }
                for worker in seen.workers
            ],
            "jobQueueStatus": self._queue(one),
            "failure": seen.failure,
        }
        if customized:
            fields["customizedMetadata"] = self._metadata(one)
        return fields

    def _queue(self, one: HostedVersion) -> dict[str, int]:
        inside = sum(said["inside"] for worker in self._workers.ready(one.key) if (said := worker.ask("state")))
        return {"remainingCapacity": max(0, one.queue - inside), "pendingRequests": inside}

    def _metadata(self, one: HostedVersion) -> Any:
        try:
            return mar.read_json(self._state.archives / one.archive, mar.BUILD)
        except (OSError, KeyError, ValueError, mar.BadArchiveError):
            return {}


def _with(now: Hosted, one: HostedVersion) -> Hosted:
    others = tuple(other for other in now.versions if other.key != one.key)
    defaults = now.defaults if one.model in now.defaults else {**now.defaults, one.model: one.version}
    return replace(now, versions=(*others, one), defaults=defaults)


def _without(now: Hosted, one: HostedVersion) -> Hosted:
    others = tuple(other for other in now.versions if other.key != one.key)
    defaults = {name: version for name, version in now.defaults.items() if (name, version) != one.key}
    return replace(now, versions=others, defaults=defaults)
