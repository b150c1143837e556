"""Batched and asynchronous mode through a real TorchServe: what both do, and what becomes of a worker that is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.live.conftest import ROOT, Serving, run_tool
from torchserve_dag.clients import KeyFile, ServingError, WorkerInfo
from torchserve_dag.runtime.messages import Text
from torchserve_dag.server.connect import torchserve_client as client
from torchserve_dag.server.state import State

MODES = ("batched", "asynchronous")
WITHIN_S = 10
"""Within this time every client has an answer, and the service is back."""

FILE = """
name: {name}
version: "1.0"
does: Gives a text in capitals, some of them slowly.
code: shout.py
nodes: {{shout: {{function: shout}}}}
output: shout
serve: {{mode: {mode}, max_inside: {inside}, timeout_s: 20}}
"""

CODE = """
import time
from pathlib import Path
from torchserve_dag.runtime.messages import Text

def shout(request: Text) -> Text:
    if request.text == "slow":
        time.sleep(1)
    if request.text.startswith("long"):
        Path(request.text.removeprefix("long").strip() or "/dev/null").touch()
        time.sleep(15)
    return Text(request.text.upper())
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    root = tmp_path_factory.mktemp("both")
    (root / "workflows").mkdir()
    (root / "workflows" / "shout.py").write_text(CODE)
    for name, mode, inside in (("batched", MODES[0], 100), ("asynchronous", MODES[1], 100), ("narrow", MODES[1], 2)):
        (root / "workflows" / f"{name}.yaml").write_text(FILE.format(name=name, mode=mode, inside=inside))
    shared = FILE.format(name="shared", mode=MODES[0], inside=100).replace("serve: {", "serve: {batches: 3, ")
    (root / "workflows" / "shared.yaml").write_text(shared)
    for name in ("config.properties", "log4j2.xml"):
        (root / name).symlink_to(ROOT / name)
    run_tool(root, "build")
    run_tool(root, "up", "--free-ports", "--no-front-door")
    yield Serving(root, State(root))
    run_tool(root, "down")


@pytest.fixture
def http(both: Serving) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KeyFile.read(both.state.key_file).inference}", "Content-Type": "text/plain"}
    with httpx.Client(base_url=both.addresses.inference, headers=headers, timeout=30, trust_env=False) as found:
        yield found


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def workers(both: Serving, name: str) -> list[WorkerInfo]:
    with both.rest() as rest:
        return [w for m in rest.models() if m.name == name for v in m.versions for w in v.workers]


def worker(both: Serving, name: str) -> WorkerInfo:
    (found,) = workers(both, name)
    return found


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
@pytest.mark.parametrize("mode", MODES)
def test_answers_failures_and_descriptions_are_the_same(both: Serving, mode: str, protocol: Any) -> None:
    with client(both.state, protocol) as serving:
        assert serving.predict(mode, Text("a"), answer=Text) == Text("A")
        with pytest.raises(ServingError) as refused:
            serving.predict(mode, b"")
        assert (refused.value.status, refused.value.type) == (400, "InputError")
        assert serving.describe(mode)["customizedMetadata"]["name"] == mode
        assert serving.predict(mode, Text("b"), answer=Text) == Text("B")


@pytest.mark.parametrize("path", ["/predictions/asynchronous/1.0", "/models/asynchronous/invoke"])
def test_every_way_in_over_rest_is_known_as_such(http: httpx.Client, path: str) -> None:
    response = http.post(path, content="a")

    assert (response.status_code, response.json()) == (200, {"text": "A"})


def test_a_quick_request_does_not_wait_for_a_slow_one(http: httpx.Client, threads: ThreadPoolExecutor) -> None:
    slow = threads.submit(http.post, "/predictions/asynchronous", content="slow")
    quick = [http.post("/predictions/asynchronous", content="a") for _ in range(5)]

    assert [response.status_code for response in quick] == [200] * 5
    assert not slow.done()
    assert slow.result().json() == {"text": "SLOW"}


def test_one_request_too_many_is_told_when_to_come_again(http: httpx.Client, threads: ThreadPoolExecutor) -> None:
    responses = list(threads.map(lambda _: http.post("/predictions/narrow", content="slow"), range(6)))

    refused = [response for response in responses if response.status_code != 200]
    assert len(refused) == 4
    assert {(one.status_code, one.headers["retry-after"], one.json()["type"]) for one in refused} == {
        (503, "1", "Overloaded")
    }


def test_cancelling_ends_the_work_of_a_request(http: httpx.Client, threads: ThreadPoolExecutor) -> None:
    began = time.monotonic()
    headers = {"X-Cancel-Key": "mine"}
    long = threads.submit(http.post, "/predictions/asynchronous", content="long", headers=headers)
    while not http.post("/predictions/asynchronous", headers={"x-cancel": "mine"}).json()["cancelled"]:
        assert time.monotonic() < began + WITHIN_S

    assert (long.result().status_code, long.result().json()["type"]) == (499, "Cancelled")
    assert time.monotonic() < began + WITHIN_S


@pytest.mark.parametrize(
    ("mode", "whose"), [("batched", "worker"), ("asynchronous", "worker"), ("asynchronous", "guard")]
)
def test_a_worker_that_is_killed_costs_what_is_inside_and_comes_back(
    both: Serving, http: httpx.Client, threads: ThreadPoolExecutor, tmp_path: Path, mode: str, whose: str
) -> None:
    """Every client is answered, and the service is back and shown as such, though more requests come all the time."""
    began = tmp_path / "began"
    inside = [threads.submit(http.post, f"/predictions/{mode}", content=f"long {began}")]
    wait_for(began.exists)
    if mode == "asynchronous":  # more than are at work, and more of them than TorchServe sends at a time
        inside += [threads.submit(http.post, f"/predictions/{mode}", content=f"long {began}") for _ in range(3)]
        http.post(f"/predictions/{mode}", headers={"x-cancel": "nobody's"})
    pid = worker(both, mode).pid
    os.kill(psutil.Process(pid).ppid() if whose == "guard" else pid, signal.SIGKILL)
    killed = time.monotonic()
    meanwhile = [threads.submit(http.post, f"/predictions/{mode}", content="a") for _ in range(6)]

    assert {future.result().status_code for future in inside} <= {500, 507}  # TorchServe itself may say 500
    assert {future.result().status_code for future in meanwhile} <= {200, 507}
    assert http.post(f"/predictions/{mode}", content="b").json() == {"text": "B"}
    assert time.monotonic() < killed + WITHIN_S
    wait_for(lambda: worker(both, mode).ready)


# Several of TorchServe's workers with one process that computes.


def hosts_and_guests(both: Serving) -> tuple[list[int], list[int]]:
    """The workers' processes, those that have the model and those that wait; when all three are ready."""

    def ready() -> list[int]:
        return [worker.pid for worker in workers(both, "shared") if worker.ready]

    wait_for(lambda: len(ready()) == 3, 60)  # three processes import torch at once, on few cores
    pids = ready()
    wait_for(lambda: sum("-c" in psutil.Process(pid).cmdline() for pid in pids) == 2)
    guests = [pid for pid in pids if "-c" in psutil.Process(pid).cmdline()]
    return [pid for pid in pids if pid not in guests], guests


def test_no_request_waits_for_the_last_of_another_batch(
    both: Serving, http: httpx.Client, threads: ThreadPoolExecutor
) -> None:
    (host,), guests = hosts_and_guests(both)
    slow = threads.submit(http.post, "/predictions/shared", content="slow")
    time.sleep(0.3)
    quick = [http.post("/predictions/shared", content="a") for _ in range(5)]

    assert [response.json() for response in quick] == [{"text": "A"}] * 5
    assert not slow.done()
    assert slow.result().json() == {"text": "SLOW"}
    assert all(psutil.Process(pid).memory_full_info().uss < 20e6 for pid in guests), "they have no model"
    assert psutil.Process(host).memory_full_info().uss > 50e6


@pytest.mark.parametrize("whose", ["host", "guest"])
def test_a_host_or_a_guest_that_is_killed_comes_back(
    both: Serving, http: httpx.Client, threads: ThreadPoolExecutor, tmp_path: Path, whose: str
) -> None:
    began = tmp_path / "began"
    (host,), guests = hosts_and_guests(both)
    inside = threads.submit(http.post, "/predictions/shared", content=f"long {began}")
    wait_for(began.exists)
    os.kill(host if whose == "host" else guests[0], signal.SIGKILL)
    killed, left = time.monotonic(), 0 if whose == "host" else 2
    # TorchServe (0.12.0) never answers a request that it is handing to a worker while that one's connection closes.
    wait_for(lambda: sum(worker.ready for worker in workers(both, "shared")) == left)
    meanwhile = [threads.submit(http.post, "/predictions/shared", content="a") for _ in range(6)]

    assert {future.result().status_code for future in meanwhile} == {200}
    assert time.monotonic() < killed + WITHIN_S, "nobody waits for an answer"
    assert inside.result().status_code in ({500, 507} if whose == "host" else {200, 500, 507})
    hosts, guests = hosts_and_guests(both)
    assert (len(hosts), len(guests)) == (1, 2)
    assert [http.post("/predictions/shared", content="b").json() for _ in range(6)] == [{"text": "B"}] * 6


def wait_for(true: Callable[[], bool], within_s: float = WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
