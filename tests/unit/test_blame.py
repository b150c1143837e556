"""What counts against a version: its own failures. What a client decides about its own request ejects nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from tests.unit.envoy_alone import Alone, Answer, Received, alone
from torchserve_dag.front_door.access_logs import FEEDBACK_LOG, REQUESTS_LOG
from torchserve_dag.front_door.clusters import EJECT_AFTER
from torchserve_dag.front_door.routes_file import RouteFile
from torchserve_dag.front_door.splits import ServedVersion
from torchserve_dag.releases import request_log, stop_if, version_metrics
from torchserve_dag.releases.version_metrics import VersionMetrics
from torchserve_dag.runtime.protos.inference_pb2 import PredictionsRequest

SERVED = tuple(ServedVersion("m", version, 30.0, ours=True) for version in ("1.0", "2.0"))


def answer(request: Received) -> Answer:
    """As the body says: with a status, or after so many seconds."""
    status, _, seconds = request.body.decode().partition(" ")
    time.sleep(float(seconds or 0))
    return Answer(b"", int(status))


@pytest.fixture(scope="module")
def envoy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    with alone(tmp_path_factory.mktemp("project"), SERVED) as running:
        running.upstream.rest = answer
        route = RouteFile({"1.0": 0, "2.0": 100}, fallback="1.0", slow_s=20.0)
        running.door.change(lambda now: replace(now, served=SERVED, routes={"m": route}, defaults={"m": "1.0"}))
        yield running


@pytest.fixture
def token(envoy: Alone) -> str:
    return envoy.token


def measured(envoy: Alone, until: Callable[[VersionMetrics], bool]) -> VersionMetrics:
    deadline = time.monotonic() + 60
    while not until(now := version_metrics.read(envoy.door.admin).get(("m", "2.0"), VersionMetrics())):
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
    return now


def failing(envoy: Alone) -> bool:
    return any(
        host["health_status"].get("failed_outlier_check")
        for cluster in envoy.door.admin.clusters()
        for host in cluster.get("host_statuses", [])
    )


def leave(envoy: Alone, body: str, after_s: float) -> None:
    """Send a request, and disconnect before its answer."""
    head = envoy.target.head("/predictions/m", "Content-Type: text/plain", f"Content-Length: {len(body)}")
    with envoy.target.tls("http/1.1") as connection:
        connection.sendall(head + b"\r\n\r\n" + body.encode())
        time.sleep(after_s)


def test_what_a_client_decides_is_no_error_of_a_version_and_ejects_none(envoy: Alone, token: str) -> None:
    before = measured(envoy, lambda _: True)
    for _ in range(3 * EJECT_AFTER):
        assert envoy.status(token, body="408") == 408  # its deadline
        assert envoy.status(token, body="400") == 400  # its mistake
        leave(envoy, "200 1", 0.0)
    time.sleep(1.5)  # Envoy looks once a second
    now = measured(envoy, lambda now: max(now.given_up.values(), default=0) >= 6 * EJECT_AFTER)

    assert not failing(envoy)
    assert (now.requests, now.errors) == (before.requests, before.errors)
    assert not stop_if.reason(stop_if.read("errors > 1% or p50 > 1.3x"), now.since(before), VersionMetrics())


def test_over_grpc_too_a_clients_own_deadline_is_no_error(envoy: Alone) -> None:
    before = measured(envoy, lambda _: True)
    envoy.upstream.grpc = lambda *_: b'{"code": 408, "type": "Timeout", "message": "No answer within 0.1 s."}'
    codes = set()
    with envoy.grpc() as stub:
        for _ in range(2 * EJECT_AFTER):
            with pytest.raises(grpc.RpcError) as refused:
                stub.Predictions(PredictionsRequest(model_name="m", input={"data": b"x"}), metadata=envoy.metadata)
            codes.add(refused.value.code())
    time.sleep(1.5)
    now = measured(envoy, lambda _: True)

    assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert not failing(envoy)
    assert (now.requests, now.errors) == (before.requests, before.errors)


def test_over_grpc_the_workers_token_is_the_front_doors(envoy: Alone) -> None:
    """Whose cancel key it is, and whose score: a client's own entry comes earlier in the message, and loses."""
    envoy.upstream.grpc = lambda *_: b"{}"
    with envoy.grpc() as stub:
        asked = PredictionsRequest(model_name="m", input={"data": b"x", "x-door-token": b"bob"})
        stub.Predictions(asked, metadata=[*envoy.metadata, ("x-door-token", "bob")])

    assert envoy.upstream.called[-1].input["x-door-token"] == b"alice"


def test_clients_that_wait_in_vain_roll_a_version_back(envoy: Alone) -> None:
    """A version that hangs has no errors: its clients leave."""
    before = measured(envoy, lambda _: True)
    for _ in range(4):
        leave(envoy, "200 3", 1.5)
    now = measured(envoy, lambda now: now.since(before).given_up_after(1000) >= 4)
    why = stop_if.reason(stop_if.read("errors > 1%"), now.since(before), VersionMetrics())

    assert why
    assert why.startswith("clients gave up after 1000 ms in 4 of 4 requests")


def test_what_the_version_did_wrong_ejects_it(envoy: Alone, token: str) -> None:
    before = measured(envoy, lambda _: True)
    for _ in range(EJECT_AFTER):
        assert envoy.status(token, body="500") == 500  # the fallback does the same here
    deadline = time.monotonic() + 60
    while not failing(envoy):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    now = measured(envoy, lambda now: now.errors - before.errors >= EJECT_AFTER)

    assert now.requests - before.requests == EJECT_AFTER


def test_no_client_says_what_the_front_door_says_to_the_worker(envoy: Alone, token: str) -> None:
    """A description has the builds, the hashes and every version."""
    envoy.upstream.received.clear()
    forged = {"describe": "True", "explain": "True", "x_door_token": "bob", "x_door_first": "9.0"}
    envoy.status(token, body="200", **forged)
    (received,) = envoy.upstream.received
    seen = {name.lower(): value for name, value in received.headers.items()}

    assert {"describe", "explain"}.isdisjoint(seen)
    assert (seen["x-door-token"], seen["x-door-first"]) == ("alice", "2.0")


def test_feedback_is_a_number_in_a_range(envoy: Alone, token: str) -> None:
    kind = {"content_type": "application/json"}
    said = [
        envoy.status(token, "/feedback", json.dumps({"request_id": "a", "score": score}), **kind)
        for score in (1, -1e6, 1e308, -1e7, "high", True, None)
    ]

    assert said == [202, 202, 400, 400, 400, 400, 400]


def read(logs: Path) -> list[str]:
    return [(logs / name).read_text() for name in (REQUESTS_LOG, FEEDBACK_LOG)]


def test_feedback_of_another_token_is_nobodys(envoy: Alone, token: str) -> None:
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
