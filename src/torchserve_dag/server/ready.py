"""Wait until a server serves every archive, or report why it will not."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil

from torchserve_dag.clients import Client, ModelInfo, ServingError
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.logs import Logs
from torchserve_dag.server.processes import alive

POLL_S = 0.3
FAILURES = 3
"""After this many failed starts of one worker the wait ends with an error."""

ModelVersion = tuple[str, str]
"""A model, and one of its versions."""


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

    @property
    def done(self) -> bool:
        return 0 < self.wanted <= self.ready


ReadinessCallback = Callable[[list[Readiness]], None]


class StartupWait:
    """Polls a starting server until it is ready."""

    def __init__(self, archives: Mapping[ModelVersion, str], logs: Logs, failures: int = FAILURES) -> None:
        """`archives`: (model, version) → file."""
        self.archives = archives
        self.logs = logs
        self._failures = failures
        self._pids: dict[tuple[str, str, str], set[int]] = {}

    def wait(
        self, client: Client, is_alive: Callable[[], bool], timeout_s: float, progress: ReadinessCallback | None = None
    ) -> None:
        """Raises ServerError if the server ends, a worker keeps failing, or models are not ready in time."""
        deadline = time.monotonic() + timeout_s
        seen = [Readiness(name, version, 0, 0) for name, version in self.archives]
        while time.monotonic() < deadline:
            if not is_alive():
                raise ServerError(f"TorchServe ended: {self.logs.server_failure() or 'its log gives no reason'}.")
            models = _models(client)
            if models is not None:
                seen = self._look(models)
            if progress:
                progress(seen)
            if all(model.done for model in seen):
                return
            time.sleep(POLL_S)
        slow = ", ".join(f"{model.name} {model.version}" for model in seen if not model.done)
        raise ServerError(
            f"Not ready after {timeout_s:g} s: {slow}; allow more time with --timeout, or see {self.logs.folder}."
        )

    def _look(self, models: list[ModelInfo]) -> list[Readiness]:
        versions = {(model.name, version.version): version for model in models for version in model.versions}
        readiness = []
        for name, version in self.archives:
            info = versions.get((name, version))
            if info is None:  # TorchServe registers all archives before it answers the first request
                archive = self.archives[name, version]
                why = self.logs.archive_failure(archive) or f"see {self.logs.folder}"
                raise ServerError(f"TorchServe did not accept {archive}: {why}.")
            for worker in info.workers:
                if not worker.ready and worker.pid > 0:
                    self._count(name, version, worker.id, worker.pid)
            loading = tuple(worker.id for worker in info.workers if not worker.ready)
            readiness.append(
                Readiness(name, version, len(info.workers) - len(loading), max(1, info.min_workers), loading)
            )
        return readiness

    def _count(self, name: str, version: str, worker: str, pid: int) -> None:
        pids = self._pids.setdefault((name, version, worker), set())
        pids.add(pid)
        if len(pids) >= FAILURES or (len(pids) >= self._failures and _ended(pid)):
            why = self.logs.worker_failure(name, version) or "its log gives no reason"
            raise ServerError(
                f"A worker of {name} {version} keeps failing: {why.rstrip('.')}; the whole log is in "
                f"{self.logs.folder / 'model_log.log'}."
            )


def _ended(pid: int) -> bool:
    """Whether a worker has ended. TorchServe does not restart one of an asynchronous model that cannot be loaded."""
    try:
        return not alive(psutil.Process(pid))
    except psutil.Error:
        return True


def _models(client: Client) -> list[ModelInfo] | None:
    try:
        return client.models(timeout=10)
    except ServingError:  # the server does not listen yet
        return None
