"""Wait until a server serves every archive, or report which it will not, and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import psutil

from torchserve_dag.archives.archive import ModelVersion
from torchserve_dag.clients import Client, ModelInfo, ServingError, WorkerInfo
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.logs import Logs
from torchserve_dag.server.processes import runs, workers_of

POLL_S = 0.1
FAILURES = 3
"""After this many failed starts of one worker its version has failed."""
GONE_S = 10.0
"""A worker that has no process for this time has failed for ever: TorchServe waits a second at most before each of its
first attempts, and in asynchronous mode it makes none after the first."""


@dataclass(frozen=True, slots=True)
class Readiness:
    """The start-up progress of one version of a model."""

    name: str
    version: str
    ready: int
    """The number of workers whose model is loaded."""
    wanted: int
    """The number of workers to wait for; zero until TorchServe has unpacked the archive."""
    loading: tuple[str, ...] = ()
    """TorchServe's ids of the workers that are not ready."""
    failed: bool = False
    """Whether it will not be served."""

    @property
    def done(self) -> bool:
        return self.failed or 0 < self.wanted <= self.ready


ReadinessCallback = Callable[[list[Readiness]], None]
FailureCallback = Callable[[ModelVersion], None]
"""Called once for each version that has failed, to take it out of the server."""


class StartupWait:
    """Polls a starting server until each version is ready or has failed."""

    def __init__(self, archives: Mapping[ModelVersion, str], logs: Logs, failures: int = FAILURES) -> None:
        """`archives`: (model, version) → file."""
        self.archives = archives
        self.logs = logs
        self.failed: dict[ModelVersion, str] = {}
        """Why each version that has failed will not be served, in a sentence without its full stop."""
        self._failures = failures
        self._pids: dict[tuple[str, str, str], set[int]] = {}
        self._gone: dict[str, float] = {}
        """Since when a worker has no process."""

    def wait(
        self,
        client: Client,
        java: Callable[[], psutil.Process | None],
        timeout_s: float,
        progress: ReadinessCallback | None = None,
        on_failure: FailureCallback | None = None,
    ) -> dict[ModelVersion, str]:
        """Returns `failed`; after `timeout_s` whatever is not ready has failed.

        `java` is TorchServe's process while it runs. Raises ServerError if it ends.
        """
        deadline = time.monotonic() + timeout_s
        seen = [Readiness(name, version, 0, 0) for name, version in self.archives]
        while not all(model.done for model in seen):
            torchserve = java()
            if torchserve is None:
                raise ServerError(f"TorchServe ended: {self.logs.server_failure() or 'its log gives no reason'}.")
            known = set(self.failed)
            models = _models(client)
            if models is not None:
                seen = self._look(models, torchserve)
            if time.monotonic() > deadline:
                self._give_up(seen, timeout_s)
            for version in self.failed.keys() - known:
                if on_failure:
                    on_failure(version)
            seen = [replace(one, failed=(one.name, one.version) in self.failed) for one in seen]
            if progress:
                progress(seen)
            if not all(model.done for model in seen):
                time.sleep(POLL_S)
        return self.failed

    def _give_up(self, seen: list[Readiness], timeout_s: float) -> None:
        for one in seen:
            if not one.done:
                last = self.logs.worker_failure(one.name, one.version)
                more = f"allow more time with --timeout, or see {self.logs.folder}"
                more += f"; its log has: {last.rstrip('.')}" if last else ""
                self.failed[one.name, one.version] = (
                    f"{one.name} {one.version} was not ready after {timeout_s:g} s: {more}"
                )

    def _look(self, models: list[ModelInfo], java: psutil.Process) -> list[Readiness]:
        versions = {(model.name, version.version): version for model in models for version in model.versions}
        readiness = []
        for name, version in self.archives:
            info = versions.get((name, version))
            if (name, version) in self.failed:
                readiness.append(Readiness(name, version, 0, 0, failed=True))
            elif info is None:  # TorchServe registers all archives before it answers the first request
                archive = self.archives[name, version]
                why = self.logs.archive_failure(archive) or f"see {self.logs.folder}"
                self.failed[name, version] = f"TorchServe did not accept {name} {version}: {why.rstrip('.')}"
                readiness.append(Readiness(name, version, 0, 0, failed=True))
            else:
                waiting = [worker for worker in info.workers if not worker.ready]
                if any(self._fails(name, version, worker, java) for worker in waiting):
                    why = self.logs.worker_failure(name, version) or "its log gives no reason"
                    self.failed[name, version] = (
                        f"A worker of {name} {version} keeps failing: {why.rstrip('.')}; "
                        f"torchserve-dag logs {name}/{version} shows all of it"
                    )
                loading = tuple(worker.id for worker in waiting)
                ready = len(info.workers) - len(loading)
                readiness.append(Readiness(name, version, ready, max(1, info.min_workers), loading))
        return readiness

    def _fails(self, name: str, version: str, worker: WorkerInfo, java: psutil.Process) -> bool:
        """Whether a worker that is not ready has failed so often that it will not become ready."""
        pids = self._pids.setdefault((name, version, worker.id), set())
        if worker.pid > 0:  # TorchServe does not know the process of a worker that ends early
            pids.add(worker.pid)
            if sum(not runs(pid) for pid in pids) >= self._failures:
                return True
            if runs(worker.pid) or workers_of(java, frozenset({worker.id})):
                self._gone.pop(worker.id, None)
            elif time.monotonic() - self._gone.setdefault(worker.id, time.monotonic()) > GONE_S:
                return True
        return len(pids) >= FAILURES or self.logs.failed_again(name, version) >= FAILURES - 1


def _models(client: Client) -> list[ModelInfo] | None:
    try:
        return client.models(timeout=10)
    except ServingError:  # the server does not listen yet
        return None


def wait_until_ready(
    client: Client,
    versions: Collection[ModelVersion],
    timeout_s: float,
    progress: ReadinessCallback | None = None,
) -> dict[ModelVersion, str]:
    """Wait until the direct host serves these versions; those that have failed, each with the reason.

    The reasons are sentences without their full stops.
    """
    deadline, failed = time.monotonic() + timeout_s, dict[ModelVersion, str]()
    while True:
        try:
            models = client.models(timeout=10)
        except ServingError:  # the keeper is being started again
            models = []
        seen = [_seen(models, version, failed) for version in versions]
        if time.monotonic() > deadline:
            for one in seen:
                if not one.done:
                    why = (
                        f"{one.name} {one.version} was not ready after {timeout_s:g} s: allow more time with --timeout"
                    )
                    failed[one.name, one.version] = why
        if progress:
            progress(seen)
        if all(one.done or (one.name, one.version) in failed for one in seen):
            return failed
        time.sleep(POLL_S)


def _seen(models: Collection[ModelInfo], version: ModelVersion, failed: dict[ModelVersion, str]) -> Readiness:
    info = next((one for m in models for one in m.versions if (m.name, one.version) == version), None)
    if info is None:
        return Readiness(*version, 0, 0)
    if info.failure:
        failed[version] = f"A worker of {' '.join(version)} keeps failing: {info.failure.rstrip('.')}"
    ready = sum(worker.ready for worker in info.workers)
    return Readiness(*version, ready, max(1, info.min_workers), failed=version in failed)
