"""A real Envoy before a real TorchServe: shares, sticky users, rules, shadows, fallbacks; tokens; and what it keeps out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

from tests.live.conftest import ROOT, run_tool
from torchserve_dag import serving
from torchserve_dag.clients import (
    GrpcClient,
    ModelNotFound,
    Options,
    Overloaded,
    RestClient,
    ServerFailed,
    ServingError,
    TooLarge,
    Unauthorized,
)
from torchserve_dag.front_door import certificate
from torchserve_dag.front_door.door import Door
from torchserve_dag.front_door.tokens import ALGORITHM, ISSUER
from torchserve_dag.releases import hand
from torchserve_dag.server.connect import torchserve_client
from torchserve_dag.server.state import State
from torchserve_dag.source import CheckError

pytestmark = pytest.mark.timeout(300)

FUNCTIONS = """
from __future__ import annotations
import os, time
from torchserve_dag.messages import InputError, Text

def answer(text: str, version: str) -> Text:
    if text == "refuse": raise InputError("That is refused.", 422)
    return Text(version)

def good(text: Text) -> Text: return answer(text.text, "1.0")
def new(text: Text) -> Text: return answer(text.text, "2.0")
def fails(text: Text) -> Text: raise RuntimeError("3.0")
def crashes(text: Text) -> Text: os._exit(1)
def hangs(text: Text) -> Text: time.sleep(20); return answer(text.text, "5.0")
"""
VERSIONS = {"1.0": "good", "2.0": "new", "3.0": "fails", "4.0": "crashes", "5.0": "hangs"}
SPLIT = """
echo:
  versions: {"1.0": 90, "2.0": 10}
  sticky: header x-user-id
  always: {header x-tester=yes: "2.0"}
"""
PROTOCOLS = ("rest", "grpc")


def write_version(root: Path, name: str, version: str, function: str, code: str, more: str = "") -> None:
    (root / "workflows").mkdir(exist_ok=True)
    (root / "workflows" / f"{name}-{version}.yaml").write_text(
        f'name: {name}\nversion: "{version}"\ndoes: A test.\ncode: {code}\nnodes:\n'
        f"  answer: {{function: {function}, inputs: {{text: request}}}}\noutput: answer\nserve: {{batch: 16{more}}}\n"
    )


@dataclass(frozen=True)
class Served:
    root: Path

    @property
    def state(self) -> State:
        return State(self.root)

    @property
    def door(self) -> Door:
        return Door(self.state)

    @property
    def address(self) -> str:
        record = self.door.record()
        assert record
        return serving.here(record.settings)

    def client(self, protocol: str) -> RestClient | GrpcClient:
        return serving.client(self.state, protocol)  # type: ignore[arg-type]

    def http(self, token: str | None = None, **more: Any) -> httpx.Client:
        """A plain client, as anybody's."""
        record = self.door.record()
        assert record
        headers = {"authorization": f"Bearer {token or (self.state.front_door / 'own_token').read_text()}"}
        trust = certificate.trust(Path(record.certificate))
        return httpx.Client(base_url=f"https://{self.address}", verify=trust, headers=headers, timeout=30, **more)

    def route(self, text: str) -> None:
        (self.root / "routes.yaml").write_text(text)
        hand.take_routes(self.root)

    def log(self, request_id: str) -> dict[str, Any]:
        """Its line in the log, which is written within half a second."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for line in (self.state.logs / "requests.log").read_text().splitlines():
                if f'"{request_id}"' in line:
                    return json.loads(line)  # type: ignore[no-any-return]
            time.sleep(0.1)
        pytest.fail(f"{request_id} is not in requests.log")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("door")
    for name in ("config.properties", "log4j2.xml"):
        shutil.copy(ROOT / name, root)
    for version, function in VERSIONS.items():
        write_version(root, "echo", version, function, "echo.py")
    write_version(root, "other", "1.0", "good", "echo.py")
    (root / "workflows" / "echo.py").write_text(FUNCTIONS)
    run_tool(root, "build")
    (root / "routes.yaml").write_text(SPLIT)
    run_tool(root, "up", "--free-ports")
    yield Served(root)
    run_tool(root, "down")


def answers(
    served: Served, protocol: str, count: int, one: Callable[[Any, int], str], threads: int = 8
) -> Counter[str]:
    """What `count` requests were answered with, from several clients at once."""

    def work(part: int) -> Counter[str]:
        with served.client(protocol) as client:
            return Counter(one(client, i) for i in range(part, count, threads))

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, range(threads)), Counter())


def ask(client: Any, name: str = "echo", version: str | None = None, text: bytes = b"hi", **route_by: str) -> str:
    """Which version answered."""
    options = Options(route_by={key.replace("_", "-"): value for key, value in route_by.items()})
    return str(client.predict(name, text, version, options=options)["text"])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ten_thousand_requests_are_shared_as_the_weights_say(served: Served, protocol: str) -> None:
    """Five thousand over each protocol: within four standard deviations, and none is lost."""
    served.route(SPLIT)
    found = answers(served, protocol, 5000, lambda client, _: ask(client))

    assert sum(found.values()) == 5000
    assert set(found) == {"1.0", "2.0"}
    assert abs(found["2.0"] - 500) < 4 * (5000 * 0.1 * 0.9) ** 0.5


def test_a_sticky_user_always_sees_one_version_over_both_protocols_and_as_shares_grow(served: Served) -> None:
    served.route(SPLIT)
    users = [f"user-{i}" for i in range(150)]
    seen: dict[str, set[str]] = {user: set() for user in users}
    for protocol in PROTOCOLS:
        with served.client(protocol) as client:
            for user in users * 2:
                seen[user].add(ask(client, x_user_id=user))

    assert all(len(versions) == 1 for versions in seen.values())
    assert {version for versions in seen.values() for version in versions} == {"1.0", "2.0"}

    served.route(SPLIT.replace('"1.0": 90, "2.0": 10', '"1.0": 60, "2.0": 40'))
    with served.client("rest") as client:
        later = {user: ask(client, x_user_id=user) for user in users}
    assert all(later[user] == "2.0" for user in users if seen[user] == {"2.0"})  # who has the new one keeps it
    assert Counter(later.values())["2.0"] > 30


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_rules_and_named_versions_win_over_weights(served: Served, protocol: str) -> None:
    served.route(SPLIT)
    with served.client(protocol) as client:
        assert {ask(client, x_tester="yes", x_user_id=f"u{i}") for i in range(50)} == {"2.0"}
        assert {ask(client, version="1.0", x_tester="yes") for _ in range(10)} == {"1.0"}
        assert ask(client, "other") == "1.0"  # a model without a route: its default
        with pytest.raises(ModelNotFound, match=r"no such version of echo; it has 1\.0, 2\.0"):
            ask(client, version="9.0")
        with pytest.raises(ModelNotFound, match="no model of that name"):
            ask(client, "nobody")
        with pytest.raises(ServingError, match="That is refused") as refused:
            ask(client, text=b"refuse")
        assert refused.value.status == 422


def test_an_answer_says_which_version_and_request_it_is_of_and_the_log_has_both(served: Served) -> None:
    served.route(SPLIT)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with served.http() as http:
        answer = http.post(
            "/predictions/echo/2.0", content=b"hi", headers={"x-request-id": "my-request", "traceparent": trace}
        )
        assert (answer.headers["x-model-version"], answer.headers["x-request-id"]) == ("2.0", "my-request")
        failed = http.post("/predictions/echo/3.0", content=b"hi", headers={"x-request-id": "it-fails"})
        assert failed.json()["request_id"] == "it-fails"  # the worker knows it by this name, and so does its log
    with served.client("grpc") as grpc, pytest.raises(ServerFailed) as error:
        grpc.predict("echo", b"hi", "3.0", options=Options(request_id="grpc-fails"))
    assert error.value.request_id == "grpc-fails"

    line = served.log("my-request")
    assert (line["version"], line["status"], line["token"], line["traceparent"]) == ("2.0", 200, "command-line", trace)
    assert line["duration_ms"] >= 0
    worker_log = (served.state.logs / "model_log.log").read_text()
    assert "it-fails" in worker_log
    assert "grpc-fails" in worker_log


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_fallback_answers_for_a_version_that_fails_or_crashes_or_is_slow(served: Served, protocol: str) -> None:
    for bad, slow in (("3.0", 10), ("4.0", 0.5), ("5.0", 0.3)):
        served.route(f'echo:\n  versions: {{"1.0": 50, "{bad}": 50}}\n  fallback: "1.0"\n  slow_s: {slow}\n')

        assert answers(served, protocol, 24, lambda client, _: ask(client), threads=4) == {"1.0": 24}
    served.route(SPLIT)


def test_a_version_that_keeps_failing_is_left_alone_for_a_while(served: Served) -> None:
    """Its share goes to the fallback without being tried first; a request that names it still gets it."""
    served.route('echo:\n  versions: {"1.0": 50, "3.0": 50}\n  fallback: "1.0"\n')
    answers(served, "rest", 60, lambda client, _: ask(client))
    deadline = time.monotonic() + 10
    while served.door.traffic().ejected != (("echo", "3.0"),):
        assert time.monotonic() < deadline, "it is not ejected"
        time.sleep(0.1)
    with served.http() as http:
        for i in range(20):
            assert http.post("/predictions/echo", content=b"hi", headers={"x-request-id": f"alone-{i}"}).is_success
        assert http.post("/predictions/echo/3.0", content=b"hi").status_code == 500

    assert {served.log(f"alone-{i}")["tries"] for i in range(20)} == {1}
    while served.door.traffic().ejected:
        assert time.monotonic() < deadline + 20, "it is not tried again"
        time.sleep(0.2)
    served.route(SPLIT)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shadows_that_hang_and_crash_change_nothing_for_clients(served: Served, protocol: str) -> None:
    served.route('echo:\n  versions: {"1.0": 100}\n  shadow: {"4.0": 100, "5.0": 100}\n')
    before = served.door.admin.stats(
        r"^cluster\.rest_echo/[45]_0\.upstream_rq_total$|^cluster\.grpc_echo/[45]_0\.upstream_rq_total$"
    )
    found = answers(served, protocol, 200, lambda client, _: ask(client))

    assert found == {"1.0": 200}
    after = served.door.admin.stats(
        r"^cluster\.rest_echo/[45]_0\.upstream_rq_total$|^cluster\.grpc_echo/[45]_0\.upstream_rq_total$"
    )
    assert sum(after.values()) - sum(before.values()) == 400  # both had a copy of each
    served.route(SPLIT)


def test_a_route_that_cannot_be_is_refused_with_its_line_and_changes_nothing(served: Served) -> None:
    served.route(SPLIT)
    wrong = 'echo:\n  versions: {"1.0": 90, "7.0": 10}\n'
    with pytest.raises(
        CheckError, match=r'routes\.yaml:2: echo: there is no version "7\.0"\n  help: known: 1\.0, 2\.0'
    ):
        served.route(wrong)
    checked = subprocess.run(
        [sys.executable, "-m", "torchserve_dag", "routes"], cwd=served.root, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 1
    assert 'there is no version "7.0"' in checked.stderr
    served.route(SPLIT)
    assert "2.0" in run_tool(served.root, "routes")


class TestTokens:
    @pytest.fixture
    def issue(self, served: Served) -> Iterator[Callable[..., str]]:
        names: list[str] = []

        def new(name: str, *words: str) -> str:
            names.append(name)
            return run_tool(served.root, "token", "new", name, *words).strip()

        yield new
        for name in names:
            if any(token.name == name for token in served.door.tokens.issued()):
                run_tool(served.root, "token", "revoke", name)

    def test_a_token_passes_until_it_is_revoked(self, served: Served, issue: Callable[..., str]) -> None:
        token = issue("alice", "--expires", "1h")
        with served.http(token) as http:
            assert http.post("/predictions/echo", content=b"hi", headers={"x-request-id": "of-alice"}).is_success
            assert served.log("of-alice")["token"] == "alice"  # noqa: S105 (a name)
            run_tool(served.root, "token", "revoke", "alice")
            refused = http.post("/predictions/echo", content=b"hi")

        assert refused.status_code == 403
        assert "revoked" in refused.json()["message"]
        assert "alice" not in run_tool(served.root, "token", "list")

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_a_wrong_a_forged_and_an_expired_token_are_told_apart_from_good_ones(
        self, served: Served, protocol: str
    ) -> None:
        key = bytes.fromhex((served.state.front_door / "token_key").read_text())
        claims = {"iss": ISSUER, "sub": "eve", "jti": "x"}
        own = (served.state.front_door / "own_token").read_text()
        bad = {
            "nonsense": "nonsense",
            "expired": jwt.encode({**claims, "exp": int(time.time()) - 120}, key, ALGORITHM),
            "without an end": jwt.encode(claims, key, ALGORITHM),
            "forged": jwt.encode(
                {**claims, "exp": int(time.time()) + 900}, b"another key of thirty-two bytes!", ALGORITHM
            ),
            "never issued": jwt.encode({**claims, "exp": int(time.time()) + 900}, key, ALGORITHM),
            "unsigned": jwt.encode({**claims, "exp": int(time.time()) + 900}, None, "none"),
            "TorchServe's own": json.loads(served.state.key_file.read_text())["inference"]["key"],
        }
        for why, token in bad.items():
            with client_with(served, protocol, token) as client:
                assert outcome(client) == "401", why
        with client_with(served, protocol, own) as client:
            assert ask(client) in {"1.0", "2.0"}

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_a_token_has_a_rate_of_its_own(self, served: Served, protocol: str, issue: Callable[..., str]) -> None:
        token = issue(f"slow-{protocol}", "--rate", "10")
        with client_with(served, protocol, token) as client:
            found = Counter(outcome(client) for _ in range(40))
        assert 10 <= found["answered"] <= 20
        assert found["answered"] + found["429"] == 40
        with served.client(protocol) as client:
            assert ask(client) in {"1.0", "2.0"}  # and nobody else's


def outcome(client: Any) -> str:
    try:
        ask(client)
    except (Overloaded, Unauthorized) as error:
        return str(error.status)
    return "answered"


def client_with(served: Served, protocol: str, token: str) -> RestClient | GrpcClient:
    """Somebody's client, with nothing but the certificate and a token."""
    import grpc

    record = served.door.record()
    assert record
    if protocol == "grpc":
        credentials = grpc.ssl_channel_credentials(Path(record.certificate).read_bytes())
        return GrpcClient(served.address, token=token, credentials=credentials, server_name="localhost", retries=0)
    transport = httpx.HTTPTransport(verify=certificate.trust(Path(record.certificate)))
    return RestClient(f"https://{served.address}", token=token, transport=transport, retries=0)


def test_feedback_meets_its_request_in_the_experiment(served: Served) -> None:
    served.route('echo:\n  versions: {"1.0": 50, "2.0": 50}\n')
    with served.client("rest") as client:
        assert isinstance(client, RestClient)
        for i in range(60):
            name = f"scored-{i}"
            version = str(client.predict("echo", b"hi", options=Options(request_id=name))["text"])
            client.feedback(name, 0.9 if version == "2.0" else 0.5 + i / 1000)
    with served.http() as http:
        for body in (
            {"request_id": "x"},
            {"score": 1},
            {"request_id": 1, "score": 1},
            {"request_id": "x", "score": "1"},
        ):
            assert http.post("/feedback", json=body).status_code == 400
        assert (
            http.post("/feedback", content=b"not json", headers={"content-type": "application/json"}).status_code == 400
        )
        assert http.get("/feedback").status_code == 405
    served.log("scored-59")
    deadline = time.monotonic() + 10
    while len((served.state.logs / "feedback.log").read_text().splitlines()) < 60:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    result = json.loads(run_tool(served.root, "experiment", "echo", "--since", "1m", "--json"))

    (feedback,) = [one for one in result["differences"] if one["what"] == "feedback"]
    assert feedback["difference"] == pytest.approx(0.37, abs=0.04)
    assert feedback["needed"] == 0
    assert feedback["low"] > 0
    served.route(SPLIT)


def test_management_and_everything_else_is_not_there(served: Served) -> None:
    """TorchServe's own log of requests stays as it was."""
    management = json.loads(served.state.key_file.read_text())["management"]["key"]
    asked = [
        ("GET", "/models"), ("POST", "/models?url=evil.mar"), ("PUT", "/models/echo/1.0/set-default"),
        ("DELETE", "/models/echo/2.0"), ("GET", "/api-description"), ("OPTIONS", "/"), ("GET", "/"), ("GET", "/metrics"),
        ("POST", "/workflows"), ("POST", "/wfpredict/x"), ("GET", "/v2/health/live"), ("POST", "/explanations/echo"),
        ("GET", "/predictions/../models"), ("GET", "/predictions/%2e%2e/models"), ("GET", "//models"), ("GET", "/token?type=management"),
    ]  # fmt: skip
    with served.http() as http, served.http(management) as stolen:
        found = {path: http.request(method, path).status_code for method, path in asked}
        assert set(found.values()) <= {400, 404}, found
        assert {stolen.request(method, path).status_code for method, path in asked} <= {400, 401}
        assert http.get("/predictions%2F..%2Fmodels").status_code in {400, 404}
        assert http.get("/ping").json()["status"] == "Healthy"
    with torchserve_client(served.state) as client:
        assert [one.version for model in client.models() for one in model.versions if model.name == "echo"] == list(
            VERSIONS
        )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_body_that_is_too_large_is_told_so(served: Served, protocol: str) -> None:
    with served.client(protocol) as client, pytest.raises(TooLarge):
        ask(client, text=b"x" * 27_000_000)


def test_envoy_that_is_killed_is_started_again(served: Served) -> None:
    served.route(SPLIT)
    envoy = next(one for one in children(served) if "envoy" in one.name())
    envoy.kill()
    deadline = time.monotonic() + 15
    found = ""
    while time.monotonic() < deadline and not found:
        try:
            with served.client("rest") as client:
                found = ask(client, x_tester="yes")
        except ServingError:
            time.sleep(0.1)

    assert found == "2.0"


def children(served: Served) -> Sequence[Any]:
    import psutil

    record = served.door.record()
    assert record
    return psutil.Process(record.pid).children()


def test_a_sigterm_loses_no_request_that_was_accepted(served: Served) -> None:
    """Clients go on sending while the server ends: each gets its answer, or cannot connect any more."""
    served.route('echo:\n  versions: {"1.0": 100}\n')
    stopped = threading.Event()

    def work(protocol: str) -> tuple[int, str]:
        answered = 0
        with client_with(served, protocol, (served.state.front_door / "own_token").read_text()) as client:
            while True:
                try:
                    ask(client)
                    answered += 1
                except ServingError as error:
                    if stopped.is_set() and error.unserved:
                        return answered, "ended"
                    return answered, f"{type(error).__name__}: {error}"

    record = served.door.record()
    assert record
    with ThreadPoolExecutor(8) as pool:
        working = [pool.submit(work, PROTOCOLS[i % 2]) for i in range(8)]
        time.sleep(1)
        stopped.set()
        os.kill(record.pid, signal.SIGTERM)
        found = [one.result(60) for one in working]

    assert {how for _, how in found} == {"ended"}
    assert all(answered > 20 for answered, _ in found)
    run_tool(served.root, "down")
    run_tool(served.root, "up", "--free-ports")
