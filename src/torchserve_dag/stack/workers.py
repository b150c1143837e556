"""The keeper's care for the direct host's workers: as many of each version as `server/hosted.py` says, and all well.

A worker is loading until it answers, then ready, and leaving once it is to end: it gets no more requests, answers
those inside, and ends. Envoy is told of each change (`Traffic.sockets`). A keeper that is killed leaves the workers
alone; the next one finds them by their records.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torchserve_dag.archives.archive import ModelVersion
from torchserve_dag.front_door.door import Door
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.hosted import Hosted, HostedFile, HostedVersion
from torchserve_dag.server.state import State
from torchserve_dag.stack.attempt import attempt
from torchserve_dag.stack.worker_process import WorkerProcess

logger = logging.getLogger(__name__)

PAUSES_S = (0, 0, 1, 2, 5, 10, 20, 40, 60)
"""Seconds before each start of a worker that fails again and again; the last pause is repeated."""
FAILED = 3
"""A version has failed if its workers ended so often in a row before they were ready."""
STEADY_S = 10.0
"""A worker that was ready for this long did not fail."""
ASK_EVERY_S = 1.0
MISSES = 30
"""How often in a row a worker may not say how it is: then its event loop stands still, and it is killed."""
END_S = 30.0
"""How long a worker may take to end, once it is empty and was told to."""
ASKERS = 8
"""Threads that ask workers how they are."""
AT_ONCE = max(2, len(os.sched_getaffinity(0)))
"""How many workers may load at the same time."""

Stage = Literal["loading", "ready"]


@dataclass(slots=True)
class _Tries:
    """How the last starts of a version's workers went."""

    failures: int = 0
    """In a row."""
    due: float = 0.0
    """When the next worker may be started, on time.monotonic()'s clock."""
    why: str = ""
    last: float = float("-inf")
    """When a worker ended last."""


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker that does not leave, as management calls and the page of metrics show it."""

    id: str
    pid: int
    stage: Stage
    since: float
    gpu: int | None
    memory_mb: float


@dataclass(frozen=True, slots=True)
class VersionState:
    """A version with its workers."""

    hosted: HostedVersion
    default: bool
    workers: tuple[WorkerState, ...]
    failure: str
    """Why it is not served, once its workers failed FAILED times in a row; empty while it is, or may be yet."""


@dataclass(slots=True)
class _Leaving:
    since: float
    empty: int = 0
    """How often in a row it was empty."""
    told: float | None = None
    """When it was told to end."""


@dataclass(eq=False)
class Workers:
    """The workers of one project."""

    state: State
    _workers: list[WorkerProcess] = field(init=False)
    _tries: dict[ModelVersion, _Tries] = field(default_factory=lambda: defaultdict(_Tries))
    _leaving: dict[str, _Leaving] = field(default_factory=dict)
    _published: dict[str, tuple[str, ...]] | None = None
    """What Envoy was told: the sockets of each version. None: nothing yet by this keeper; an earlier one may have been
    killed as it did.
    """
    _asked: dict[str, float] = field(default_factory=dict)
    _loaded: set[ModelVersion] = field(default_factory=set)
    """Versions that have had a worker that was ready."""
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(ASKERS, "asks"))
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self._file, self._door = HostedFile(self.state), Door(self.state)
        WorkerProcess.end_unknown(self.state)
        self._workers = WorkerProcess.all(self.state)
        told: dict[str, tuple[str, ...]] = {}
        with suppress(ServerError):
            told = self._door.traffic().sockets or {}
        for worker in self._workers:  # of an earlier keeper's, those were ready that it told Envoy of
            worker.ready = worker.socket in told.get("/".join(worker.record.key), ())
            if worker.ready:
                self._loaded.add(worker.record.key)
        numbers = [int(worker.record.id) for worker in self._workers if worker.record.id.isdigit()]
        self._ids = itertools.count(max(numbers, default=0) + 1)

    def look(self) -> None:
        """Start, watch and end workers as needed. Raises ServerError, OSError."""
        hosted = self._file.read()
        said = self._ask_all()
        with self._lock:
            before = len(self._workers)
            for worker in list(self._workers):  # one's trouble is not another's
                attempt(partial(self._watch, worker, hosted, said))
            if len(self._workers) < before:
                self._forget_unpacked(hosted)
            for key in self._tries.keys() - {one.key for one in hosted.versions}:
                del self._tries[key]
            for one in hosted.versions:
                attempt(partial(self._fit, one, hosted))
        self._publish(hosted)

    def _ask_all(self) -> dict[str, Any]:
        """What each worker says of itself; None if it does not answer. Without the lock: a stuck one takes a second."""
        now = time.monotonic()
        with self._lock:
            due = [
                worker
                for worker in self._workers
                if not worker.ready or now - self._asked.get(worker.record.id, 0.0) >= ASK_EVERY_S
            ]
        for worker in due:
            self._asked[worker.record.id] = now
        answers = self._pool.map(lambda worker: worker.ask("state"), due)
        return {worker.record.id: said for worker, said in zip(due, answers, strict=True)}

    def restart(self, key: ModelVersion) -> None:
        """Replace the workers of a version one by one: each leaves when its successor is ready."""
        with self._lock:
            self._tries.pop(key, None)
            for worker in self._of(key):
                worker.save(replace(worker.record, replaced=True))

    def states(self) -> list[VersionState]:
        """Every version that is to be served."""
        hosted = self._file.read()
        with self._lock:
            return [
                VersionState(
                    one,
                    hosted.defaults.get(one.model) == one.version,
                    tuple(self._state_of(worker) for worker in self._of(one.key)),
                    tries.why if (tries := self._tries[one.key]).failures >= FAILED else "",
                )
                for one in hosted.versions
            ]

    def ready(self, key: ModelVersion) -> list[WorkerProcess]:
        """The workers of a version to which Envoy sends requests."""
        with self._lock:
            return [worker for worker in self._of(key) if self._stage(worker) == "ready"]

    def _stage(self, worker: WorkerProcess) -> Stage:
        """A worker counts as ready once Envoy knows its socket."""
        return "ready" if worker.ready and self._is_known(worker) else "loading"

    def _is_known(self, worker: WorkerProcess) -> bool:
        """Whether Envoy sends requests to it."""
        return worker.socket in (self._published or {}).get("/".join(worker.record.key), ())

    def _state_of(self, worker: WorkerProcess) -> WorkerState:
        record = worker.record
        return WorkerState(record.id, record.pid, self._stage(worker), record.since, record.gpu, worker.memory_mb())

    def _of(self, key: ModelVersion) -> list[WorkerProcess]:
        return [worker for worker in self._workers if worker.record.key == key and not worker.record.leaving]

    # One worker.

    def _watch(self, worker: WorkerProcess, hosted: Hosted, said: Mapping[str, Any]) -> None:
        one, asked = hosted.of(worker.record.key), worker.record.id in said
        if not worker.runs():
            self._ended(worker)
        elif worker.record.leaving:
            self._let_go(worker, said.get(worker.record.id))
        elif one is None:
            self._leave(worker, "its version is not served any more")
        elif not worker.ready:
            if said.get(worker.record.id) is not None:
                worker.ready, worker.ready_since = True, time.monotonic()
                worker.yield_to_others(yields=False)
                self._tries[one.key].why = ""
                self._loaded.add(one.key)
                logger.info("%s/%s: worker %s is ready", *one.key, worker.record.id)
            elif time.time() - worker.record.since > one.startup_s:
                worker.why = f"it was not loaded within {one.startup_s} s, its startupTimeout"
                worker.kill()
        elif asked:
            self._look_at(worker, said[worker.record.id])

    def _look_at(self, worker: WorkerProcess, said: Any) -> None:
        worker.misses = 0 if said else worker.misses + 1
        if said and said["hangs"]:
            self._leave(worker, "a model in it hangs")
        elif worker.misses >= MISSES:
            logger.error("%s/%s: worker %s does not answer, and is killed", *worker.record.key, worker.record.id)
            worker.kill()

    def _ended(self, worker: WorkerProcess) -> None:
        record = worker.record
        self._workers.remove(worker)
        self._leaving.pop(record.id, None)
        self._asked.pop(record.id, None)
        if not record.leaving:
            tries, now = self._tries[record.key], time.monotonic()
            steady = worker.ready and now - worker.ready_since > STEADY_S
            together = worker.ready and now - tries.last < 1.0  # with another of its version
            tries.failures = 1 if steady else max(1, tries.failures) if together else tries.failures + 1
            tries.last = now
            pause = PAUSES_S[min(tries.failures, len(PAUSES_S)) - 1]
            tries.due = time.monotonic() + pause
            where = f"torchserve-dag logs {'/'.join(record.key)} shows all of it"
            tries.why = worker.failure() or worker.why or f"a worker ended without a word; {where}"
            logger.error("%s/%s: worker %s ended: %s; another starts in %d s", *record.key, record.id, tries.why, pause)
        worker.forget()

    def _leave(self, worker: WorkerProcess, why: str) -> None:
        logger.info("%s/%s: worker %s leaves: %s", *worker.record.key, worker.record.id, why)
        worker.save(replace(worker.record, leaving=True))

    def _let_go(self, worker: WorkerProcess, said: Any) -> None:
        """End a worker that gets no more requests once it is empty, or once the time limit of those inside is over."""
        if self._is_known(worker):
            return  # Envoy has not been told yet
        now = time.monotonic()
        leaving = self._leaving.setdefault(worker.record.id, _Leaving(now))
        if leaving.told is not None:
            if now - leaving.told > END_S:
                worker.kill()
            return
        if said:
            leaving.empty = 0 if said["inside"] else leaving.empty + 1
        late = now - leaving.since > worker.record.timeout_s + 5
        if leaving.empty > 2 or worker.loads() or late:  # noqa: PLR2004 (a request may be on its way)
            leaving.told = now
            worker.end()

    # One version.

    def _fit(self, one: HostedVersion, hosted: Hosted) -> None:
        """Have as many workers as are wanted, of the archive that is wanted."""
        mine = self._of(one.key)
        current = [worker for worker in mine if worker.record.archive == one.archive and not worker.record.replaced]
        others = [worker for worker in mine if worker not in current]
        if len(current) < one.workers and (not others or len(mine) <= one.workers):
            self._start(one, hosted)
        ready = [worker for worker in current if self._stage(worker) == "ready"]
        # A worker that is replaced leaves when its successor is ready.
        surplus = others[: max(0, len(ready) + len(others) - one.workers)]
        surplus += sorted(current, key=lambda worker: worker.ready)[: max(0, len(current) - one.workers)]
        for worker in surplus:
            self._leave(worker, "it is replaced, or one too many")

    def _start(self, one: HostedVersion, hosted: Hosted) -> None:
        tries = self._tries[one.key]
        loading = sum(not worker.ready and not worker.record.leaving for worker in self._workers)
        lost = one.key in self._loaded and not any(worker.ready for worker in self._of(one.key))
        if time.monotonic() < tries.due or (loading >= AT_ONCE and not lost):
            return
        tries.due = time.monotonic() + 1.0  # if it cannot even be started
        gpu = self._gpu(hosted) if one.on_gpu else None
        worker = WorkerProcess.start(self.state, str(next(self._ids)), one, gpu, hosted.max_body)
        worker.yield_to_others(yields=any(other.ready for other in self._workers))
        tries.due = 0.0
        self._workers.append(worker)
        logger.info("%s/%s: worker %s is loading, pid %d", *one.key, worker.record.id, worker.record.pid)

    def _gpu(self, hosted: Hosted) -> int | None:
        """The GPU that fewest workers use; None if there is none."""
        count = gpus() if hosted.gpus is None else min(hosted.gpus, gpus())
        used = [worker.record.gpu for worker in self._workers]
        return min(range(count), key=used.count, default=None)

    # Envoy.

    def _publish(self, hosted: Hosted) -> None:
        """Tell Envoy which workers get requests. Raises ServerError, OSError."""
        with self._lock:
            sockets = {
                "/".join(one.key): tuple(worker.socket for worker in self._of(one.key) if worker.ready)
                for one in hosted.versions
            }
        if sockets != self._published:
            self._door.change(lambda now: replace(now, sockets=sockets))
            self._published = sockets

    def _forget_unpacked(self, hosted: Hosted) -> None:
        """Delete unpacked archives that nobody needs any more."""
        used = {worker.record.archive for worker in self._workers}
        kept = {Path(name).stem for name in used | {one.archive for one in hosted.versions}}
        for path in (self.state.direct / "models").glob("*"):
            if path.name.removesuffix(".lock").removesuffix(".part") not in kept:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def end_all(state: State) -> None:
    """End every worker, after Envoy was drained."""
    left = [worker for worker in WorkerProcess.all(state) if worker.runs()]
    for worker in left:
        worker.end()
    deadline = time.monotonic() + END_S
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [worker for worker in left if worker.runs()]
    for worker in left:
        worker.kill()


def gpus() -> int:
    """How many GPUs of NVIDIA's this machine has, of those that CUDA_VISIBLE_DEVICES names."""
    found = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if named is None else min(found, len([one for one in named.split(",") if one.strip()]))
