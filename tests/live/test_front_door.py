"""A real Envoy before a real TorchServe: shares, sticky users, rules, shadows, fallbacks; tokens; and what it keeps out."""

from __future__ import annotations

import gzip
import json
import os
import signal
import ssl
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import jwt
import pytest
from typer.testing import CliRunner

from loadtests import hostile
from tests.live.conftest import run_tool
from tests.live.door import PROTOCOLS, Served, ask, new_project, tool, write_version
from torchserve_dag.clients import (
    GrpcClient,
    ModelNotFound,
    Options,
    Overloaded,
    RequestRefused,
    RestClient,
    ServerFailed,
    ServingError,
    TooLarge,
    Unauthorized,
)
from torchserve_dag.commands import app
from torchserve_dag.front_door import certificate
from torchserve_dag.front_door.tokens import ALGORITHM, ISSUER
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.runtime.messages import Text
from torchserve_dag.runtime.protos.inference_pb2 import PredictionsRequest
from torchserve_dag.runtime.protos.inference_pb2_grpc import InferenceAPIsServiceStub
from torchserve_dag.server import processes
from torchserve_dag.server.connect import host_client, running
from torchserve_dag.server.supervised import Role, Supervised

WITHIN_S = 60
RESTARTED_S = 240
"""Six versions are loaded again, on a machine that may be busy."""

FUNCTIONS = """
from __future__ import annotations
import os, time
from dataclasses import dataclass
from torchserve_dag import InputError, Photo, Text

@dataclass(frozen=True)
class Captioned:
    photo: Photo
    caption: str

def captioned(text: Captioned) -> Text: return Text(f"{text.photo.width} wide: {text.caption}")

def answer(text: str, version: str) -> Text:
    if text == "refuse": raise InputError("That is refused.", 422)
    if text.startswith("echo "): return Text(text[5:])
    if text.startswith("raise "): raise RuntimeError(text[6:])
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
LIMITS = "limits: {headers_s: 3, body_s: 3, idle_s: 3}\n"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("door")
    new_project(root)
    for version, function in VERSIONS.items():
        write_version(root, "echo", version, function, "echo.py")
    write_version(root, "other", "1.0", "good", "echo.py")
    write_version(root, "captioned", "1.0", "captioned", "echo.py")
    (root / "workflows" / "echo.py").write_text(FUNCTIONS)
    run_tool(root, "build")
    (root / "routes.yaml").write_text(SPLIT)
    (root / "front_door.yaml").write_text(LIMITS)
    (root / "releases.yaml").write_text('echo: {served: {"3.0": {}, "4.0": {}}}\n')
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


FORM = "application/x-www-form-urlencoded"
BOUNDARY = "multipart/form-data; boundary=x"


def form(*parts: tuple[str, bytes]) -> bytes:
    heads = ((f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode(), body) for name, body in parts)
    return b"".join(head + body + b"\r\n" for head, body in heads) + b"--x--\r\n"


BODIES = [
    # What curl -d, wget, urllib and axios declare unless they are told otherwise, whatever the body is.
    ({"content-type": FORM}, b"echo I like a=b&c=%41+d", 200, "I like a=b&c=%41+d"),
    ({"content-type": f"{FORM}; charset=UTF-8"}, b'{"text": "echo I like a=b"}', 200, "I like a=b"),
    ({"content-type": FORM}, b"echo x=%", 200, "x=%"),
    ({"content-type": FORM}, b"\xff\xd8\xff\xe0", 400, "not UTF-8"),
    ({"content-type": "text/json"}, b'{"text": "echo a"}', 200, "a"),
    ({"content-type": "text/plain; charset=latin-1"}, b"echo gr\xfcn", 200, "gr\u00fcn"),
    ({"content-type": "text/plain; charset=klingon"}, b"echo a", 415, "klingon"),
    ({"content-type": "text/plain", "content-encoding": "gzip"}, gzip.compress(b"echo a", mtime=0), 200, "a"),
    ({"content-type": "text/plain", "content-encoding": "br"}, b"echo a", 415, "content encoding br"),
    ({"content-type": "application/json"}, b'{"text": "a", "text": "b"}', 400, "written twice"),
    ({"content-type": BOUNDARY}, form(("mine", b"echo a")), 200, "a"),
    ({"content-type": BOUNDARY}, form(("body", b"echo a"), ("user", b"me")), 200, "a"),
    ({"content-type": BOUNDARY}, form(("body", b"echo a"), ("body", b"echo b")), 400, "several parts called body"),
    ({"content-type": BOUNDARY}, form(("a", b"1"), ("b", b"2")), 400, "Which of a, b is the message?"),
    ({"content-type": BOUNDARY}, b"no form at all", 400, ""),
    (
        {"content-type": BOUNDARY, "content-encoding": "gzip"},
        gzip.compress(form(("a", b"1")), mtime=0),
        415,
        "cannot be compressed",
    ),
]


@pytest.mark.parametrize(("headers", "body", "status", "says"), BODIES)
def test_a_body_is_read_as_it_was_sent(
    served: Served, headers: dict[str, str], body: bytes, status: int, says: str
) -> None:
    with served.http() as http:
        found = http.post("/predictions/other", content=body, headers=headers)

    assert found.status_code == status, found.text
    assert found.json()["text"] == says if status == 200 else says in found.json()["message"]


@pytest.mark.parametrize(
    ("headers", "body", "status", "says"),
    [
        ({"content-type": FORM}, b'{"text": "echo I like a=b"}', 415, "send Content-Type: text/plain"),
        ({"content-type": FORM}, b"echo hello", 415, "send Content-Type: text/plain"),
        ({"content-type": BOUNDARY}, form(("body", b"echo a"), ("body", b"echo b")), 400, "several parts called body"),
        (
            {"content-type": "text/plain; charset=latin-1", "content-encoding": "gzip"},
            gzip.compress(b"echo \xfc", mtime=0),
            200,
            "ü",
        ),
    ],
)
def test_torchserves_own_port_takes_forms_apart_and_the_worker_says_so(
    served: Served, headers: dict[str, str], body: bytes, status: int, says: str
) -> None:
    key = json.loads(served.state.key_file.read_text())["inference"]["key"]
    where = running(served.state).addresses.inference
    sent = {**headers, "authorization": f"Bearer {key}"}
    found = httpx.post(f"{where}/predictions/other", content=body, headers=sent, trust_env=False, timeout=60)

    assert found.status_code == status, found.text
    assert found.json()["text"] == says if status == 200 else says in found.json()["message"]


def test_the_mistakes_of_clients_count_against_no_version(served: Served) -> None:
    """Ten failures in a row eject a version that has a fallback."""
    served.route('echo:\n  versions: {"1.0": 1, "2.0": 99}\n  fallback: "1.0"\n')
    wrong = [(headers, body) for headers, body, status, _ in BODIES if status != 200]
    with served.http() as http, served.client("grpc") as grpc:
        found = [
            http.post("/predictions/echo", content=body, headers=headers).status_code for headers, body in wrong * 3
        ]
        for _ in range(12):
            with pytest.raises(RequestRefused):
                grpc.predict("echo", b"\xff")
        time.sleep(1)  # Envoy tells of an ejection within half a second
        ejected = served.door.traffic().ejected

    assert len(found) > 20
    assert all(400 <= status < 500 for status in found), found
    assert ejected == ()
    served.route(SPLIT)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_message_with_a_photo_and_a_text_is_sent_in_parts(served: Served, protocol: str) -> None:
    photo = Path(__file__).parents[2] / "photos" / "coffee.jpg"
    with served.client(protocol) as client:
        found = client.predict("captioned", {"photo": photo, "caption": "a cup"}, answer=Text)
        assert found.text.endswith(" wide: a cup")
        with pytest.raises(RequestRefused, match="no captoin: its parts are photo, caption"):
            client.predict("captioned", {"photo": photo, "captoin": "a cup"})
    words = ["call", "captioned", f"photo=@{photo}", "caption=a cup", *(["--grpc"] if protocol == "grpc" else [])]
    assert json.loads(tool(served.root, *words)) == {"text": found.text}


def test_a_refused_input_is_a_status_over_grpc_too(served: Served) -> None:
    """TorchServe delivers it with the status OK."""
    record = served.door.record()
    assert record
    credentials = grpc.ssl_channel_credentials(Path(record.certificate).read_bytes())
    token = (served.state.front_door / "own_token").read_text()
    with grpc.secure_channel(served.address, credentials) as channel:
        predictions = InferenceAPIsServiceStub(channel).Predictions
        with pytest.raises(grpc.RpcError) as error:
            predictions(
                PredictionsRequest(model_name="echo", input={"body": b"refuse"}),
                metadata=(("authorization", f"Bearer {token}"),),
                timeout=30,
            )
    with served.client("grpc") as client, pytest.raises(RequestRefused) as refused:
        client.predict("echo", b"refuse")

    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert error.value.details() == "That is refused."  # type: ignore[attr-defined]
    assert (refused.value.status, refused.value.node, bool(refused.value.request_id)) == (422, "answer", True)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_fallback_answers_for_a_version_that_fails_or_crashes_or_is_slow(served: Served, protocol: str) -> None:
    for bad, slow in (("3.0", 10), ("4.0", 1.5), ("5.0", 1.0)):
        served.route(f'echo:\n  versions: {{"1.0": 50, "{bad}": 50}}\n  fallback: "1.0"\n  slow_s: {slow}\n')

        assert answers(served, protocol, 24, lambda client, _: ask(client), threads=4) == {"1.0": 24}
    served.route(SPLIT)


def test_a_version_that_keeps_failing_is_left_alone_for_a_while(served: Served) -> None:
    """Its share goes to the fallback without being tried first; a request that names it still gets it."""
    served.route('echo:\n  versions: {"1.0": 50, "3.0": 50}\n  fallback: "1.0"\n')
    answers(served, "rest", 60, lambda client, _: ask(client))
    deadline = time.monotonic() + WITHIN_S
    while served.door.traffic().ejected != (("echo", "3.0"),):
        assert time.monotonic() < deadline, "it is not ejected"
        time.sleep(0.1)
    turn, tries = 0, {2}
    with served.http() as http:
        while tries != {1} and time.monotonic() < deadline:  # what was decided is written before Envoy has it
            names, turn = [f"alone-{turn}-{i}" for i in range(20)], turn + 1
            for name in names:
                assert http.post("/predictions/echo", content=b"hi", headers={"x-request-id": name}).is_success
            tries = {served.log(name)["tries"] for name in names}
        assert http.post("/predictions/echo/3.0", content=b"hi").status_code == 500

    assert tries == {1}
    while served.door.traffic().ejected:
        assert time.monotonic() < deadline + WITHIN_S, "it is not tried again"
        time.sleep(0.2)
    served.route(SPLIT)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shadows_that_hang_and_crash_change_nothing_for_clients(served: Served, protocol: str) -> None:
    served.route('echo:\n  versions: {"1.0": 100}\n  shadow: {"4.0": 100, "5.0": 100}\n')
    before = served.door.admin.stats(
        r"^cluster\.rest_echo/[45]~0\.upstream_rq_total$|^cluster\.grpc_echo/[45]~0\.upstream_rq_total$"
    )
    found = answers(served, protocol, 200, lambda client, _: ask(client))

    assert found == {"1.0": 200}
    after = served.door.admin.stats(
        r"^cluster\.rest_echo/[45]~0\.upstream_rq_total$|^cluster\.grpc_echo/[45]~0\.upstream_rq_total$"
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
    assert 'there is no version "7.0"' in tool(served.root, "routes", code=1)
    served.route(SPLIT)
    assert "2.0" in tool(served.root, "routes")


class TestTokens:
    @pytest.fixture
    def issue(self, served: Served) -> Iterator[Callable[..., str]]:
        names: list[str] = []

        def new(name: str, *words: str) -> str:
            names.append(name)
            return tool(served.root, "token", "new", name, *words).strip()

        yield new
        for name in names:
            if any(token.name == name for token in served.door.tokens.issued()):
                tool(served.root, "token", "revoke", name)

    def test_a_token_passes_until_it_is_revoked(self, served: Served, issue: Callable[..., str]) -> None:
        token = issue("alice", "--expires", "1h")
        with served.http(token) as http:
            assert http.post("/predictions/echo", content=b"hi", headers={"x-request-id": "of-alice"}).is_success
            assert served.log("of-alice")["token"] == "alice"  # noqa: S105 (a name)
            tool(served.root, "token", "revoke", "alice")
            refused = http.post("/predictions/echo", content=b"hi")

        assert refused.status_code == 403
        assert "revoked" in refused.json()["message"]
        assert "alice" not in tool(served.root, "token", "list")

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
            began = time.monotonic()
            found = Counter(outcome(client) for _ in range(40))
            took = time.monotonic() - began
        assert 10 <= found["answered"] <= 20 + 10 * took
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
    record = served.door.record()
    assert record
    kind: type[RestClient | GrpcClient] = GrpcClient if protocol == "grpc" else RestClient
    return kind(f"https://{served.address}", token=token, ca=record.certificate, retries=0)


def test_call_and_status_need_an_address_a_certificate_and_a_token(served: Served, tmp_path: Path) -> None:
    """They work in a folder that is no project, as on another machine."""
    record = served.door.record()
    assert record
    (tmp_path / "hi.txt").write_text("hi")
    token_file = tmp_path / "token"
    token_file.write_text(served.door.issue_token("remote", 600) + "\n")
    there = ["--server", f"https://{served.address}", "--ca", record.certificate]

    def run(*words: str) -> tuple[int, str]:
        found = CliRunner().invoke(app, [*words, *there])
        return found.exit_code, found.output

    try:
        for protocol in ([], ["--grpc"]):
            code, said = run("call", "echo/1.0", str(tmp_path / "hi.txt"), "--token-file", str(token_file), *protocol)
            assert (code, json.loads(said)["text"]) == (0, "1.0")
        assert run("status") == (0, f"server https://{served.address}\nstate up\n")
        assert run("status", "--token-file", str(token_file))[1].endswith("state up\ntoken accepted\n")
        code, said = run("status", "--token", "wrong")
        assert (code, "401" in said) == (1, True)
        code, said = run("status", "echo")
        assert (code, "does not describe its models" in said) == (1, True)
    finally:
        served.door.revoke_token("remote")


def test_a_renewed_certificate_is_shown_without_a_restart(served: Served) -> None:
    record = served.door.record()
    assert record
    host, port = served.address.split(":")
    before = ssl.get_server_certificate((host, int(port)))
    certificate._make(Path(record.certificate), Path(record.key))
    deadline = time.monotonic() + WITHIN_S
    while ssl.get_server_certificate((host, int(port))) == before:
        assert time.monotonic() < deadline, "the old one is shown"
        time.sleep(0.1)

    with served.client("grpc") as grpc, served.client("rest") as rest:  # which know the file, and nothing else
        assert {ask(grpc), ask(rest)} <= {"1.0", "2.0"}


def test_feedback_meets_its_request_in_the_experiment(served: Served) -> None:
    served.route('echo:\n  versions: {"1.0": 50, "2.0": 50}\n')
    ended = time.monotonic() + WITHIN_S
    while served.door.traffic().ejected:  # by a test before: its share would go to the other version
        assert time.monotonic() < ended
        time.sleep(0.1)
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
    deadline = time.monotonic() + WITHIN_S
    while '"scored-59"' not in (served.state.logs / "feedback.log").read_text():  # another test may have posted, too
        assert time.monotonic() < deadline
        time.sleep(0.1)
    result = json.loads(tool(served.root, "experiment", "echo", "--since", "1m", "--json"))

    assert [one["what"] for one in result["differences"]].count("feedback") == 1, result
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
        assert {http.request(method, "/predictions/echo").status_code for method in ("OPTIONS", "DELETE", "PATCH")} == {
            405
        }
        assert {stolen.request(method, path).status_code for method, path in asked} <= {400, 401}
        assert http.get("/predictions%2F..%2Fmodels").status_code in {400, 404}
        assert http.get("/ping").json()["status"] == "Healthy"
    with host_client(served.state) as client:
        assert [one.version for model in client.models() for one in model.versions if model.name == "echo"] == list(
            VERSIONS
        )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_body_that_is_too_large_is_told_so(served: Served, protocol: str) -> None:
    with served.client(protocol) as client, pytest.raises(TooLarge):
        ask(client, text=b"x" * 27_000_000)


class TestHostile:
    """The whole of it, with ten thousand connections and good clients' times, is `loadtests/front_door.py`."""

    @pytest.fixture
    def target(self, served: Served) -> hostile.Target:
        host, port = served.address.split(":")
        return hostile.Target(host, int(port), (served.state.front_door / "own_token").read_text())

    @pytest.fixture(autouse=True)
    def plain(self, served: Served) -> Iterator[list[int]]:
        """TorchServe sees the requests of good clients, and no others; they are answered while all this goes on.

        What a test lets through on purpose, it adds to the list.
        """
        served.route('echo:\n  versions: {"1.0": 100}\n')
        seen, stop, sent, let_through = served.seen(), threading.Event(), [], []

        def work() -> None:
            with served.client("rest") as client:
                while not stop.is_set():
                    sent.append(ask(client))
                    time.sleep(0.02)

        with ThreadPoolExecutor(1) as pool:
            working = pool.submit(work)
            yield let_through
            stop.set()
            working.result(60)
        assert set(sent) == {"1.0"}
        expected = len(sent) + sum(let_through)
        assert served.seen(seen + expected) - seen == expected

    def test_who_is_slow_or_idle_is_ended_at_the_limits(self, target: hostile.Target) -> None:
        """Heads and bodies that come a byte at a time, and connections on which nothing comes."""
        ways: list[Callable[[], int]] = [
            lambda: hostile.slowloris(target, 20, 45.0),
            lambda: hostile.slow_bodies(target, 20, 45.0),
            lambda: hostile.idle_until_ended(target, 20, 45.0, tls=True),
            lambda: hostile.idle_until_ended(target, 200, 45.0, tls=False),
        ]
        with ThreadPoolExecutor(len(ways)) as pool:
            found = list(pool.map(lambda way: way(), ways))

        assert found == [20, 20, 20, 200]

    def test_heads_that_are_too_large_are_refused(self, target: hostile.Target) -> None:
        assert set(hostile.large_headers(target).values()) <= {400, 431, None}

    def test_nothing_is_smuggled(self, target: hostile.Target, plain: list[int]) -> None:
        """What is ambiguous is refused; what is not reaches TorchServe as the one request that it is."""
        found = hostile.smuggled(target)
        whole = [found.pop(why) for why in ("a folded header", "an upgrade to HTTP/2")]
        plain.append(len(whole))

        assert whole == [200, 200]
        assert set(found.values()) <= {400, 501}, found

    def test_resets_over_http2_end_the_connection(self, target: hostile.Target) -> None:
        assert hostile.rapid_resets(target, 5000) in {"ended", "told to go away"}


def wait_until_whole(served: Served, killed: str, pid: int) -> None:
    deadline, supervised = time.monotonic() + RESTARTED_S, Supervised(served.state)
    while any(one.problem or (one.name == killed and one.pid == pid) for one in supervised.report()):
        assert time.monotonic() < deadline, supervised.report()
        time.sleep(0.1)


@pytest.mark.parametrize("role", ["keeper", "watcher", "Envoy", "TorchServe"])
def test_a_process_that_is_killed_is_started_again_by_another(served: Served, role: Role) -> None:
    """The versions and shares stay; without the keeper or the watcher, no request is lost."""
    served.route(SPLIT)
    supervised = Supervised(served.state)
    before = {one.name: one.pid for one in supervised.report()}
    os.kill(before[role], signal.SIGKILL)
    if role == "TorchServe":
        sentence = tool(served.root, "status", code=1)
        assert f"TorchServe (pid {before[role]})" in sentence
        with served.http() as http:
            refused = http.post("/predictions/echo", content=b"hi")
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            deadline = time.monotonic() + 60
            while http.get("/ping").status_code != 503:  # Envoy asks TorchServe once a second
                assert time.monotonic() < deadline
    if role in {"keeper", "watcher"}:
        assert answers(served, "rest", 200, lambda client, _: ask(client, x_tester="yes")) == {"2.0": 200}
    wait_until_whole(served, role, before[role])

    assert {one.name: one.pid for one in supervised.report() if one.name != role} == {
        name: pid for name, pid in before.items() if name != role
    }
    with served.client("rest") as rest, served.client("grpc") as grpc:
        assert {ask(rest, x_tester="yes"), ask(grpc, x_tester="yes")} == {"2.0"}
        assert ask(rest, version="1.0") == "1.0"
    tool(served.root, "status")
    assert "running already" in tool(served.root, "up", code=1)


def test_up_starts_the_keeper_and_the_watcher_where_both_were_killed(served: Served) -> None:
    """Which is what a parent would do, had the watcher one."""
    served.route(SPLIT)
    supervised = Supervised(served.state)
    before = {one.name: one.pid for one in supervised.report()}
    for role in ("watcher", "keeper"):
        os.kill(before[role], signal.SIGKILL)
    assert "torchserve-dag up starts what is missing" in tool(served.root, "status", code=1)
    assert answers(served, "grpc", 50, lambda client, _: ask(client, x_tester="yes")) == {"2.0": 50}
    run_tool(served.root, "up")

    after = {one.name: one.pid for one in supervised.report()}
    assert {name for name in after if after[name] == before[name]} == {"Envoy", "TorchServe", "gateway"}
    assert not any(one.problem for one in supervised.report())


def test_nothing_that_the_server_keeps_is_for_other_users(served: Served) -> None:
    """Nobody else enters the folder; and of what we write in it, nothing is readable should it be copied elsewhere."""
    state = served.door.state
    java = {state.logs / name for name in ("ts_log.log", "model_log.log", "access_log.log", "ts_metrics.log")}
    ours = [path for path in state.folder.rglob("*") if state.tmp not in path.parents and path not in java]

    assert stat.S_IMODE(state.folder.stat().st_mode) == 0o700
    assert len(ours) > 10
    for path in ours:
        if path.suffix != ".pem" and path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_a_failure_names_the_command_that_shows_why_and_nobody_obeys_what_its_client_wrote(served: Served) -> None:
    forged = "raise x\n[METRICS]forged_total.Count:1|#a:b|#type:COUNTER|#hostname:h,1\r[PID]1"
    with served.http() as http:
        headers = {"x-request-id": "why-it-failed", "content-type": "text/plain"}
        failure = http.post("/predictions/other", content=forged, headers=headers)
    assert failure.status_code == 500
    assert failure.json()["message"].endswith(": torchserve-dag logs --request why-it-failed says why.")
    deadline, said = time.monotonic() + WITHIN_S, ""
    while not ("RuntimeError: x" in said and "500  POST other/1.0" in said):  # the logs are written now and then
        assert time.monotonic() < deadline, said
        said = CliRunner().invoke(app, ["logs", "--request", "why-it-failed", "--project", str(served.root)]).stdout
    page = httpx.get(f"{running(served.state).addresses.metrics}/metrics", trust_env=False).text

    assert "request why-it-failed: answer: good failed. (fault " in said
    assert "forged" in said
    assert "forged" not in page


def test_a_sigterm_loses_no_request_that_was_accepted(served: Served) -> None:
    """Clients go on sending while the server ends: each gets its answer, or cannot connect any more.

    Every process gets the signal at once, as from systemd or a container. The last test of this file: the server has ended after it.
    """
    served.route('echo:\n  versions: {"1.0": 100}\n')
    stopped = threading.Event()
    under_way = threading.Barrier(9, timeout=WITHIN_S)

    def work(protocol: str) -> tuple[int, str]:
        answered = 0
        with client_with(served, protocol, (served.state.front_door / "own_token").read_text()) as client:
            while True:
                try:
                    ask(client)
                    answered += 1
                    if answered == 21:
                        under_way.wait()
                except ServingError as error:
                    if stopped.is_set() and error.unserved:
                        return answered, "ended"
                    return answered, f"{type(error).__name__}: {error}"

    family = processes.family(served.state)
    with ThreadPoolExecutor(8) as pool:
        working = [pool.submit(work, PROTOCOLS[i % 2]) for i in range(8)]
        under_way.wait()
        stopped.set()
        for process in family:
            process.terminate()
        found = [one.result(60) for one in working]

    assert {how for _, how in found} == {"ended"}
    assert all(answered > 20 for answered, _ in found)
    assert processes.wait(family, WITHIN_S) == []
