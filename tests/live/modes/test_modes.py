"""Batched and asynchronous mode through a real TorchServe: what both do, and what becomes of a worker that is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.live.conftest import Serving, on_torchserve
from torchserve_dag.clients import KeyFile, ServingError, WorkerInfo
from torchserve_dag.runtime.messages import Text
from torchserve_dag.server.connect import host_client as client

MODES = ("batched", "asynchronous")
WITHIN_S = 240
"""Within this time every client has an answer, and the service is back: less than a request waits at its gate."""

FILE = """
name: {name}
version: "1.0"
does: Gives a text in capitals, once a gate is open where the text names one.
code: modes.py
nodes: {{shout: {{function: shout}}}}
output: shout
serve: {{mode: {mode}, max_inside: {inside}, timeout_s: 400}}
"""

CODE = """
import time
from pathlib import Path
from torchserve_dag import Text

def shout(request: Text) -> Text:
    if request.text.startswith("gate "):
        gate = Path(request.text.removeprefix("gate "))
        gate.with_suffix(".begun").touch()
        end = time.monotonic() + 300
        while not gate.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return Text("THROUGH")
    return Text(request.text.upper())
"""

FILES = {
    "workflows/modes.py": CODE,
    "workflows/batched.yaml": FILE.format(name="batched", mode=MODES[0], inside=100),
    "workflows/asynchronous.yaml": FILE.format(name="asynchronous", mode=MODES[1], inside=100),
    "workflows/narrow.yaml": FILE.format(name="narrow", mode=MODES[1], inside=2),
}


@pytest.fixture
def http(server: Serving) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KeyFile.read(server.state.key_file).inference}", "Content-Type": "text/plain"}
    with httpx.Client(base_url=server.addresses.inference, headers=headers, timeout=400, trust_env=False) as found:
        yield found


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def workers(server: Serving, name: str) -> list[WorkerInfo]:
    with server.rest() as rest:
        return [w for m in rest.models() if m.name == name for v in m.versions for w in v.workers]


def one_is_ready(server: Serving, name: str) -> bool:
    """Whether the only worker is ready; there is none while the version is healed."""
    return [worker.ready for worker in workers(server, name)] == [True]


def worker(server: Serving, name: str) -> WorkerInfo:
    (found,) = workers(server, name)
    return found


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
@pytest.mark.parametrize("mode", MODES)
def test_answers_failures_and_descriptions_are_the_same(server: Serving, mode: str, protocol: Any) -> None:
    with client(server.state, protocol) as serving:
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


class Gate:
    """Requests that name the gate wait in the model until the gate is opened."""

    def __init__(self, folder: Path) -> None:
        self._file, self.body = folder / "gate", f"gate {folder / 'gate'}"

    def begun(self) -> bool:
        return self._file.with_suffix(".begun").exists()

    def open(self) -> None:
        self._file.touch()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate(tmp_path)
    yield made
    made.open()


def test_a_quick_request_does_not_wait_for_a_slow_one(
    http: httpx.Client, threads: ThreadPoolExecutor, gate: Gate
) -> None:
    slow = threads.submit(http.post, "/predictions/asynchronous", content=gate.body)
    quick = [http.post("/predictions/asynchronous", content="a") for _ in range(5)]

    assert [response.status_code for response in quick] == [200] * 5
    assert not slow.done()
    gate.open()
    assert slow.result().json() == {"text": "THROUGH"}


def test_one_request_too_many_is_told_when_to_come_again(
    http: httpx.Client, threads: ThreadPoolExecutor, gate: Gate
) -> None:
    asked = [threads.submit(http.post, "/predictions/narrow", content=gate.body) for _ in range(6)]
    wait_for(lambda: sum(one.done() for one in asked) == 4)
    gate.open()
    responses = [one.result() for one in asked]

    refused = [response for response in responses if response.status_code != 200]
    assert len(refused) == 4
    assert {(one.status_code, one.headers["retry-after"], one.json()["type"]) for one in refused} == {
        (503, "1", "Overloaded")
    }


def test_cancelling_ends_the_work_of_a_request(http: httpx.Client, threads: ThreadPoolExecutor, gate: Gate) -> None:
    began = time.monotonic()
    headers = {"X-Cancel-Key": "mine"}
    long = threads.submit(http.post, "/predictions/asynchronous", content=gate.body, headers=headers)
    while not http.post("/predictions/asynchronous", headers={"x-cancel": "mine"}).json()["cancelled"]:
        assert time.monotonic() < began + WITHIN_S

    assert (long.result().status_code, long.result().json()["type"]) == (499, "Cancelled")
    assert time.monotonic() < began + WITHIN_S


@on_torchserve
@pytest.mark.parametrize(
    ("mode", "whose"),
    [
        ("batched", "worker"),
        ("asynchronous", "worker"),
        ("asynchronous", "guard"),
        ("asynchronous", "both"),
    ],
)
def test_a_worker_that_is_killed_costs_what_is_inside_and_comes_back(
    server: Serving, http: httpx.Client, threads: ThreadPoolExecutor, gate: Gate, mode: str, whose: str
) -> None:
    """The service is back and shown as such, though more requests come all the time; and every client is answered,
    unless a worker's two processes end at once: then TorchServe (0.12.0) forgets what it had sent to them.
    """
    asynchronous, forgets = mode == "asynchronous", whose == "both"

    def post(body: str) -> Future[httpx.Response]:
        return threads.submit(http.post, f"/predictions/{mode}", content=body, timeout=30 if forgets else 400)

    inside = [post(gate.body)]
    wait_for(gate.begun)
    if asynchronous:  # more than are at work, and more of them than TorchServe sends at a time
        inside += [post(gate.body) for _ in range(3)]
        http.post(f"/predictions/{mode}", headers={"x-cancel": "nobody's"})
    pid = worker(server, mode).pid
    guard = psutil.Process(pid).ppid()
    for one in {"worker": [pid], "guard": [guard], "both": [guard, pid]}[whose]:
        os.kill(one, signal.SIGKILL)
    killed = time.monotonic()
    meanwhile = [post("a") for _ in range(6)]

    if whose != "worker":  # a guard starts another computing process itself, and TorchServe sees nothing of it
        wait_for(lambda: not one_is_ready(server, mode))
    wait_for(lambda: one_is_ready(server, mode))
    gate.open()
    if not forgets:  # 500 is TorchServe's own; 503 while it is healed; 200 of the next worker
        assert {future.result().status_code for future in inside} <= {200, 500, 507}
        assert {future.result().status_code for future in meanwhile} <= {200, 503, 507}

    def answers() -> bool:
        return bool(http.post(f"/predictions/{mode}", content="b", timeout=WITHIN_S).json() == {"text": "B"})

    wait_for(answers)
    assert time.monotonic() < killed + WITHIN_S
    wait_for(lambda: one_is_ready(server, mode))


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
