"""Which versions the keeper heals: those of which TorchServe says less, or more, than their processes do."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from torchserve_dag.clients import VersionInfo, WorkerInfo
from torchserve_dag.front_door.splits import ServedVersion
from torchserve_dag.server import processes
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.state import ServerRecord, State
from torchserve_dag.server.status import _version
from torchserve_dag.stack import heal
from torchserve_dag.stack.heal import Healer

WORKER = [sys.executable, "-c", "import time; time.sleep(600)", "--sock-name", "/tmp/.ts.sock.9000"]
WITHIN_S = 60


@pytest.fixture
def java(tmp_path: Path) -> Iterator[psutil.Process]:
    """A process in the place of TorchServe's, with one worker of the id 9000; it starts another if there is a file
    `again`.
    """
    state = State(tmp_path)
    state.prepare()
    again = str(tmp_path / "again")
    program = f"""
import os, subprocess, time
while True:
    subprocess.Popen({WORKER!r}).wait()
    while not os.path.exists({again!r}):
        time.sleep(0.01)
"""
    pid = processes.spawn([sys.executable, "-c", program], state)
    state.save(ServerRecord(pid, Addresses()))
    java = psutil.Process(pid)
    wait_until(java, 1)
    yield java
    processes.kill(processes.family(state))


def wait_until(java: psutil.Process, workers: int) -> None:
    deadline = time.monotonic() + WITHIN_S
    while len(processes.workers_of(java, frozenset({"9000"}))) != workers:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def said(*, ready: bool, pid: int) -> VersionInfo:
    """What TorchServe says of a version with one worker."""
    worker = WorkerInfo("9000", ready, pid, gpu=False)
    return VersionInfo("1.0", default=True, workers=(worker,), min_workers=1, max_workers=1, batch_size=1,
                       max_batch_delay_ms=1, response_timeout_s=1, queued=0, archive="")  # fmt: skip


def stuck_after(tmp_path: Path, info: VersionInfo, *, streams: bool = True) -> list[float]:
    """The seconds, of 0, 2 and 100, after which the version is to be healed."""
    served, healer, key = (
        ServedVersion("m", "1.0", 1.0, ours=True, streams=streams),
        Healer(State(tmp_path)),
        ("m", "1.0"),
    )
    return [after for after in (0, 2, 100) if healer._is_stuck(key, served, info, 1000.0 + after)]


def test_a_worker_whose_processes_have_all_ended_is_healed_whatever_torchserve_says(
    tmp_path: Path, java: psutil.Process
) -> None:
    """Of one in asynchronous mode it goes on saying that it is ready."""
    (pid,) = processes.workers_of(java, frozenset({"9000"}))
    assert stuck_after(tmp_path, said(ready=True, pid=pid)) == []
    assert stuck_after(tmp_path, said(ready=True, pid=ended())) == []  # its guard starts another computing process
    assert stuck_after(tmp_path, said(ready=False, pid=pid)) == [2, 100]  # TorchServe never calls it ready again
    assert stuck_after(tmp_path, said(ready=False, pid=pid), streams=False) == []

    worker = psutil.Process(pid)
    worker.kill()
    wait_until(java, 0)
    processes.wait([worker], WITHIN_S)
    for ready in (True, False):
        assert stuck_after(tmp_path, said(ready=ready, pid=pid)) == [2, 100]
        assert stuck_after(tmp_path, said(ready=ready, pid=pid), streams=False) == [100]


@pytest.mark.parametrize(("pid", "state"), [(os.getpid(), "ready"), (None, "starting")], ids=["runs", "has ended"])
def test_status_calls_no_version_ready_whose_worker_has_no_process(pid: int | None, state: str) -> None:
    assert _version("m", said(ready=True, pid=pid or ended()), {}).state == state


def test_a_version_is_scaled_only_once_torchserve_has_started_its_process_again(
    tmp_path: Path, java: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled before, the worker would be started all the same, and take a request with it."""
    monkeypatch.setattr(heal, "RESTART_S", float(WITHIN_S))
    (pid,) = processes.workers_of(java, frozenset({"9000"}))
    ended_one = psutil.Process(pid)
    ended_one.kill()
    processes.wait([ended_one], WITHIN_S)
    info = said(ready=False, pid=pid)
    waiting = threading.Thread(target=Healer(State(tmp_path))._wait_until_started, args=[info.workers])
    waiting.start()
    assert waiting.is_alive()

    (tmp_path / "again").touch()
    waiting.join(WITHIN_S / 2)
    assert not waiting.is_alive()
    assert len(processes.workers_of(java, frozenset({"9000"}))) == 1
