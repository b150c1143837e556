"""What counts against a version: its own failures. What a client decides about its own request ejects nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.unit.real_envoy import RealEnvoy, real_envoy
from torchserve_dag.front_door.bootstrap import FEEDBACK_LOG, REQUESTS_LOG
from torchserve_dag.front_door.envoy_config import EJECT_AFTER
from torchserve_dag.front_door.routes_file import RouteFile
from torchserve_dag.front_door.splits import ServedVersion
from torchserve_dag.releases import request_log, stop_if, version_metrics
from torchserve_dag.releases.version_metrics import VersionMetrics
from torchserve_dag.server.ports import Addresses

SERVED = tuple(ServedVersion("m", version, 30.0, ours=True) for version in ("1.0", "2.0"))


class Worker(BaseHTTPRequestHandler):
    """Answers as the body says: with a status, or after so many seconds; and remembers the headers that it got."""

    protocol_version = "HTTP/1.1"
    seen: list[dict[str, str]] = []  # noqa: RUF012 (the server makes an object for each request)

    def do_POST(self) -> None:
        self.seen.append(dict(self.headers.items()))
        status, _, seconds = self.rfile.read(int(self.headers["Content-Length"])).decode().partition(" ")
        time.sleep(float(seconds or 0))
        self.send_response(int(status))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def envoy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealEnvoy]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Worker)
    Thread(target=server.serve_forever, daemon=True).start()
    where = Addresses(inference=f"http://127.0.0.1:{server.server_port}")
    with real_envoy(tmp_path_factory.mktemp("project"), where) as running:
        route = RouteFile({"1.0": 0, "2.0": 100}, fallback="1.0", slow_s=20.0)
        running.door.change(lambda now: replace(now, served=SERVED, routes={"m": route}, defaults={"m": "1.0"}))
        yield running
    server.shutdown()


@pytest.fixture
def token(envoy: RealEnvoy) -> Iterator[str]:
    yield envoy.door.issue_token("alice", 600, 100_000)
    envoy.door.revoke_token("alice")


def measured(envoy: RealEnvoy, until: Callable[[VersionMetrics], bool]) -> VersionMetrics:
    deadline = time.monotonic() + 60
    while not until(now := version_metrics.read(envoy.door.admin).get(("m", "2.0"), VersionMetrics())):
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
    return now


def failing(envoy: RealEnvoy) -> bool:
    return any(
        host["health_status"].get("failed_outlier_check")
        for cluster in envoy.door.admin.clusters()
        for host in cluster.get("host_statuses", [])
    )


def leave(envoy: RealEnvoy, token: str, body: str, after_s: float) -> None:
    """Send a request, and disconnect before its answer."""
    connection = envoy.connect()
    connection.request("POST", "/predictions/m", body, {"Authorization": f"Bearer {token}"})
    time.sleep(after_s)
    connection.close()


def test_what_a_client_decides_is_no_error_of_a_version_and_ejects_none(envoy: RealEnvoy, token: str) -> None:
    before = measured(envoy, lambda _: True)
    for _ in range(3 * EJECT_AFTER):
        assert envoy.status(token, body="408") == 408  # its deadline
        assert envoy.status(token, body="400") == 400  # its mistake
        leave(envoy, token, "200 1", 0.0)
    time.sleep(1.5)  # Envoy looks once a second
    now = measured(envoy, lambda now: max(now.given_up.values(), default=0) >= 6 * EJECT_AFTER)

    assert not failing(envoy)
    assert (now.requests, now.errors) == (before.requests, before.errors)
    assert not stop_if.reason(stop_if.read("errors > 1% or p50 > 1.3x"), now.since(before), VersionMetrics())


def test_clients_that_wait_in_vain_roll_a_version_back(envoy: RealEnvoy, token: str) -> None:
    """A version that hangs has no errors: its clients leave."""
    before = measured(envoy, lambda _: True)
    for _ in range(4):
        leave(envoy, token, "200 3", 1.5)
    now = measured(envoy, lambda now: now.since(before).given_up_after(1000) >= 4)
    why = stop_if.reason(stop_if.read("errors > 1%"), now.since(before), VersionMetrics())

    assert why
    assert why.startswith("clients gave up after 1000 ms in 4 of 4 requests")


def test_what_the_version_did_wrong_ejects_it(envoy: RealEnvoy, token: str) -> None:
    before = measured(envoy, lambda _: True)
    for _ in range(EJECT_AFTER):
        assert envoy.status(token, body="500") == 500  # the fallback does the same here
    deadline = time.monotonic() + 60
    while not failing(envoy):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    now = measured(envoy, lambda now: now.errors - before.errors >= EJECT_AFTER)

    assert now.requests - before.requests == EJECT_AFTER


def test_no_client_says_what_the_front_door_says_to_the_worker(envoy: RealEnvoy, token: str) -> None:
    """A description has the builds, the hashes and every version."""
    Worker.seen.clear()
    forged = {"describe": "True", "explain": "True", "x_door_token": "bob", "x_door_first": "9.0"}
    envoy.status(token, body="200", **forged)
    (seen,) = Worker.seen

    assert {"describe", "explain"}.isdisjoint(name.lower() for name in seen)
    assert (seen["x-door-token"], seen["x-door-first"]) == ("alice", "2.0")


def test_feedback_is_a_number_in_a_range(envoy: RealEnvoy, token: str) -> None:
    kind = {"content_type": "application/json"}
    said = [
        envoy.status(token, "/feedback", json.dumps({"request_id": "a", "score": score}), **kind)
        for score in (1, -1e6, 1e308, -1e7, "high", True, None)
    ]

    assert said == [202, 202, 400, 400, 400, 400, 400]


def read(logs: Path) -> list[str]:
    return [(logs / name).read_text() for name in (REQUESTS_LOG, FEEDBACK_LOG)]


def test_feedback_of_another_token_is_nobodys(envoy: RealEnvoy, token: str) -> None:
    bob = envoy.door.issue_token("bob", 600)
    for whose, named in ((token, "by-alice"), (token, "same"), (bob, "same")):
        envoy.status(whose, body="200", x_request_id=named)
    for named, score in (("by-alice", 5), ("same", 7)):
        envoy.status(
            bob, "/feedback", json.dumps({"request_id": named, "score": score}), content_type="application/json"
        )
    envoy.door.revoke_token("bob")
    deadline, logs = time.monotonic() + 60, envoy.door.state.logs
    while [text.count("by-alice") + text.count("same") for text in read(logs)] != [3, 2]:  # Envoy writes now and then
        assert time.monotonic() < deadline
        time.sleep(0.1)
    found = [(one.id, one.feedback) for one in request_log.read(logs, "m") if one.id in {"by-alice", "same"}]

    assert found == [("by-alice", None), ("same", None), ("same", 7.0)]
