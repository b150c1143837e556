"""Start the workers of a version again where TorchServe does not.

TorchServe (0.12.0) never calls a worker in asynchronous mode ready again once that worker has ended, and gives up a
worker that failed to start for five minutes. Scaling the version to no worker and back makes new ones; TorchServe then
gives them the requests that the old ones had not answered.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import httpx

from torchserve_dag.archives.archive import ModelVersion
from torchserve_dag.clients import Client, VersionInfo, WorkerInfo
from torchserve_dag.front_door.door import Door, Traffic
from torchserve_dag.front_door.splits import ServedVersion
from torchserve_dag.server import processes
from torchserve_dag.server.connect import host_tokens, management_client, running
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State

logger = logging.getLogger(__name__)

LOOK_S = 30.0
"""How often TorchServe is asked for its workers while the processes of all of them run."""
PATIENCE_S = 60.0
"""How long TorchServe may take to start a worker in batched mode again."""
LAST_WORDS_S = 0.5
"""How long TorchServe may take to read the failures that a worker in asynchronous mode wrote before it ended. If the
version is scaled to no worker sooner, nobody answers their requests; if it is not scaled, TorchServe starts processes
again and again, and loses a request with each."""
RESTART_S = 5.0
"""How long TorchServe may pause before it starts the process of a worker again; its first pauses are 0, 1 and 1 s."""
LONGEST_PAUSE_S = 60.0
"""Between two attempts for one version; the pauses before are 1, 2, 4 … s."""
AGAIN_S = 5.0
"""The pause after an attempt that failed."""
READY_S = 600.0
SCALE_S = 120.0


@dataclass(frozen=True, slots=True)
class _Sight:
    """What was seen last of a version."""

    pids: tuple[int, ...] = ()
    broken_at: float | None = None
    """Since when not all its workers are ready; None while they are."""
    next_at: float = 0.0
    """When it may be healed, at the earliest."""
    tries: int = 0
    """How often it was healed since it was whole for a while."""


class Healer:
    """Looks after the workers of the versions that the front door serves."""

    def __init__(self, state: State) -> None:
        self._state, self._door = state, Door(state)
        self._seen: dict[ModelVersion, _Sight] = {}
        self._asked_at = float("-inf")
        self._healing: threading.Thread | None = None

    def look(self) -> None:
        """Begin to heal a version that needs it. Raises ServerError or ServingError."""
        if self._healing and self._healing.is_alive():
            return
        now = time.monotonic()
        dead = any(not processes.runs(pid) for sight in self._seen.values() for pid in sight.pids)
        waits = any(sight.broken_at is not None for sight in self._seen.values())
        if now - self._asked_at < LOOK_S and not dead and not waits:
            return
        self._asked_at = now
        traffic = self._door.traffic()
        for model, number, workers in traffic.resting[:1]:  # an earlier keeper was killed while it healed
            self._begin((model, number), workers)
            return
        with management_client(self._state) as client:
            infos = {(model.name, one.version): one for model in client.models(timeout=10) for one in model.versions}
        for one in traffic.served:
            version = (one.model, one.version)
            info = infos.get(version)
            if info and self._is_stuck(version, one, info, now):
                sight = self._seen[version]
                pause = min(2.0**sight.tries, LONGEST_PAUSE_S)
                self._seen[version] = replace(sight, next_at=now + pause, tries=sight.tries + 1)
                self._begin(version, info.min_workers)
                return

    def _begin(self, version: ModelVersion, workers: int) -> None:
        self._healing = threading.Thread(target=self._heal, args=(version, workers), daemon=True)
        self._healing.start()

    def _is_stuck(self, version: ModelVersion, served: ServedVersion, info: VersionInfo, now: float) -> bool:
        before = self._seen.get(version) or _Sight()
        whole = all(worker.ready and self._has_process(worker) for worker in info.workers) and bool(info.workers)
        sight = replace(
            before,
            pids=tuple(worker.pid for worker in info.workers if worker.pid > 0),
            broken_at=None if whole else now if before.broken_at is None else before.broken_at,
            tries=0 if whole and now > before.next_at + LONGEST_PAUSE_S else before.tries,
        )
        self._seen[version] = sight
        if sight.broken_at is None or not info.min_workers or now < sight.next_at:
            return False
        gone = not any(self._has_process(worker) for worker in info.workers)
        patience_s = LAST_WORDS_S if served.streams else PATIENCE_S
        return (gone or served.streams) and now - sight.broken_at > patience_s

    def _has_process(self, worker: WorkerInfo) -> bool:
        """Whether a process of a worker runs. Of one in asynchronous mode whose processes all end at once, TorchServe
        goes on saying that it is ready.
        """
        return processes.runs(worker.pid) or bool(self._processes([worker]))

    def _processes(self, workers: Iterable[WorkerInfo]) -> set[int]:
        """The pids of those processes of workers that TorchServe started."""
        record = self._state.record()
        java = processes.java(record, self._state) if record else None
        return processes.workers_of(java, frozenset(worker.id for worker in workers)) if java else set()

    def _heal(self, version: ModelVersion, workers: int) -> None:
        """Meanwhile requests for the version get 503, or its fallback's answers."""
        name = "/".join(version)
        logger.warning("TorchServe does not start the workers of %s again: it is scaled to none and back", name)
        try:
            self._door.change(lambda now: replace(now, resting=(*_others(now, version), (*version, workers))))
            self._wait_for_processes(version)
            for count in (0, workers):
                scale(self._state, version, count)
            self._wait(version)
            self._door.change(lambda now: replace(now, resting=_others(now, version)))
            logger.info("%s serves again", name)
        except Exception:  # whatever it is, the keeper goes on, and tries again after a while
            logger.exception("%s cannot be healed yet", name)
            time.sleep(AGAIN_S)

    def _wait_for_processes(self, version: ModelVersion) -> None:
        """Wait until TorchServe has started the processes of a version's workers again.

        Scaling ends a process that runs. One that TorchServe (0.12.0) is to start after a pause is started though its
        worker is gone; it takes a request from the version's queue, and nobody answers that request.
        """
        with management_client(self._state) as client:
            self._wait_until_started(_workers(client, version))

    def _wait_until_started(self, workers: Sequence[WorkerInfo]) -> None:
        deadline = time.monotonic() + RESTART_S
        while not all(map(self._has_process, workers)) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _wait(self, version: ModelVersion) -> None:
        """Wait until a worker is ready. Raises ServerError, also if a worker ends: it may never be ready again."""
        deadline = time.monotonic() + READY_S
        before: set[int] = set()
        with management_client(self._state) as client:
            while True:
                workers = _workers(client, version)
                if any(worker.ready for worker in workers):
                    return
                now = self._processes(workers)
                if before - now:
                    raise ServerError(f"A worker of {'/'.join(version)} ended before its model was loaded.")
                if time.monotonic() > deadline:
                    raise ServerError(f"{'/'.join(version)} is not ready after {READY_S:g} s.")
                before = now
                time.sleep(0.3)


def _others(traffic: Traffic, version: ModelVersion) -> tuple[tuple[str, str, int], ...]:
    return tuple(one for one in traffic.resting if one[:2] != version)


def scale(state: State, version: ModelVersion, workers: int) -> None:
    """Have TorchServe run this many workers of a version. Raises ServerError."""
    address, token = running(state).addresses.management, host_tokens(state).management
    # Not `synchronous`: TorchServe would wait in one of netty's threads, and that thread's connections with it.
    query: dict[str, int | str] = {"min_worker": workers, "max_worker": workers, "synchronous": "false"}
    try:
        answer = httpx.put(
            f"{address}/models/{'/'.join(version)}",
            params=query,
            headers={"authorization": f"Bearer {token}"},
            timeout=SCALE_S,
            trust_env=False,
        )
    except httpx.HTTPError as error:
        raise ServerError(f"TorchServe does not scale {'/'.join(version)}: {error}.") from None
    if not answer.is_success:
        raise ServerError(f"TorchServe does not scale {'/'.join(version)}: {answer.text[:200].strip()}.")


def _workers(client: Client, version: ModelVersion) -> list[WorkerInfo]:
    versions = [(model.name, one) for model in client.models(timeout=10) for one in model.versions]
    return [worker for name, one in versions if (name, one.version) == version for worker in one.workers]
