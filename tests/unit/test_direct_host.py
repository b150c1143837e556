"""The direct host: its workers, as the keeper cares for them, and its management API. Without Envoy."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from tests.unit.test_dev import CODE, write_workflow
from torchserve_dag.archives import archive as archives
from torchserve_dag.archives.build import build
from torchserve_dag.clients import KeyFile, ModelNotFound, RequestRefused, RestClient, ServingError
from torchserve_dag.direct import grpc
from torchserve_dag.front_door.door import Door
from torchserve_dag.runtime.data import options
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.protos import inference_pb2, management_pb2
from torchserve_dag.runtime.worker.protocol import ServiceResponse
from torchserve_dag.server import processes
from torchserve_dag.server.connect import MANAGEMENT
from torchserve_dag.server.hosted import HostedFile, HostedVersion, hosted_version
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.sockets import SocketTransport
from torchserve_dag.server.state import State
from torchserve_dag.stack import direct_host, management_app
from torchserve_dag.stack.management import Management
from torchserve_dag.stack.worker_process import WorkerProcess, log_of
from torchserve_dag.stack.workers import Workers, end_all

WITHIN_S = 120
KEY = ("steps", "1.0")
BROKEN = """
from torchserve_dag import Text

raise RuntimeError("the weights are not there")

def shout(text: Text) -> str:
    return text.text
"""


class Host:
    """What the keeper does for the direct host, with no keeper around it."""

    def __init__(self, root: Path, built: Path) -> None:
        self.state = State(root)
        self.state.prepare()
        shutil.copytree(built, root / "model_store")
        Door(self.state).begin(Addresses(), direct=True)
        keys = {"management": {"key": "manage"}, "inference": {"key": "ask"}}
        self.state.key_file.write_text(json.dumps(keys))
        shutil.copy(Path(__file__).parents[2] / "config.properties", self.state.config)
        self.file = HostedFile(self.state)
        self.file.change(lambda now: replace(now, max_body=1_000_000))
        self.workers = Workers(self.state)

    def copy(self, name: str) -> archives.Archive:
        found = archives.read_archive(self.state.root / "model_store" / name)
        return archives.copy(found, self.state.archives)

    def serve(self, name: str, workers: int = 1) -> None:
        one = replace(hosted_version(self.copy(name), {}), workers=workers)
        self.file.change(lambda now: replace(now, versions=(*now.versions, one), defaults={one.model: one.version}))

    def until(self, true: Callable[[], Any]) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not true():
            assert time.monotonic() < deadline, self.log()
            self.workers.look()
            time.sleep(0.02)

    @property
    def sockets(self) -> tuple[str, ...]:
        """What Envoy is told."""
        return (Door(self.state).traffic().sockets or {}).get("/".join(KEY), ())

    def log(self) -> str:
        path = log_of(self.state, KEY)
        return path.read_text() if path.exists() else "no worker has said anything"

    def pids(self) -> list[int]:
        return [worker.pid for one in self.workers.states() for worker in one.workers]

    def ask(self, text: str) -> httpx.Response:
        """A request as Envoy passes it on, to the first worker that it knows."""
        path = self.state.front_door / self.sockets[0]
        with httpx.Client(transport=SocketTransport(path), timeout=WITHIN_S) as http:
            headers = {"content-type": "text/plain"}
            return http.post("http://worker/predictions/steps", content=text, headers=headers)

    def end(self) -> None:
        end_all(self.state)
        processes.kill(processes.family(self.state, {os.getpid()}))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    for folder in ("handlers", "workflows"):
        (root / folder).mkdir()
    (root / "workflows" / "steps.py").write_text(CODE)
    (root / "workflows" / "broken.py").write_text(BROKEN.replace("raise", "if False: raise"))
    write_workflow(root, "steps")
    write_workflow(root, "steps", "2.0")
    write_workflow(root, "words")
    build(Project(root))
    return root / "model_store"


@pytest.fixture
def host(tmp_path: Path, built: Path) -> Iterator[Host]:
    found = Host(tmp_path, built)
    yield found
    found.end()


class TestWorkers:
    def test_a_version_gets_the_workers_that_it_is_to_have_and_envoy_is_told(self, host: Host) -> None:
        host.serve("steps-1.0.mar", workers=2)
        host.until(lambda: len(host.sockets) == 2)

        assert host.ask("hi").json() == "HI"
        host.file.change(lambda now: replace(now, versions=(replace(now.versions[0], workers=1),)))
        host.until(lambda: len(host.sockets) == 1 and len(WorkerProcess.all(host.state)) == 1)
        assert host.ask("still").json() == "STILL"

    def test_a_worker_that_is_killed_is_replaced(self, host: Host) -> None:
        host.serve("steps-1.0.mar")
        host.until(lambda: host.sockets)
        before = host.pids()
        os.kill(before[0], signal.SIGKILL)

        host.until(lambda: not host.sockets)  # Envoy must not send it anything more
        host.until(lambda: host.sockets)
        assert host.pids() != before
        assert host.ask("again").json() == "AGAIN"

    def test_another_keeper_finds_the_workers_and_starts_none(self, host: Host) -> None:
        host.serve("steps-1.0.mar")
        host.until(lambda: host.sockets)
        before, sockets = host.pids(), host.sockets
        host.workers = Workers(host.state)
        host.workers.look()

        assert host.pids() == before
        assert host.sockets == sockets
        assert [worker.stage for one in host.workers.states() for worker in one.workers] == ["ready"]

    def test_a_worker_without_a_record_is_ended(self, host: Host) -> None:
        host.serve("steps-1.0.mar")
        host.until(lambda: host.sockets)
        pid = host.pids()[0]
        (next((host.state.direct / "workers").glob("*.json"))).unlink()  # its keeper was killed before it wrote it
        host.workers = Workers(host.state)
        host.workers.look()

        host.until(lambda: not processes.runs(pid))
        host.until(lambda: host.sockets and host.ask("new").json() == "NEW")

    def test_a_version_whose_workers_cannot_load_has_failed_with_the_reason(self, host: Host) -> None:
        host.serve("steps-1.0.mar")
        (unpacked,) = [host.state.direct / "models" / Path(one.archive).stem for one in host.file.read().versions]
        host.until(lambda: host.sockets)
        (unpacked / "workflows" / "steps.py").write_text(BROKEN)
        os.kill(host.pids()[0], signal.SIGKILL)

        host.until(lambda: host.workers.states()[0].failure)
        assert "the weights are not there" in host.workers.states()[0].failure
        (unpacked / "workflows" / "steps.py").write_text(CODE)
        host.until(lambda: host.sockets)  # it is tried again and again
        assert host.workers.states()[0].failure == ""

    def test_a_version_that_failed_and_was_taken_away_begins_anew(self, host: Host) -> None:
        host.serve("steps-1.0.mar")
        host.workers._tries[KEY].failures, host.workers._tries[KEY].why = 3, "earlier"
        (served,) = host.file.read().versions
        assert host.workers.states()[0].failure == "earlier"
        host.file.change(lambda now: replace(now, versions=()))
        host.workers.look()
        host.file.change(lambda now: replace(now, versions=(served,)))

        assert host.workers.states()[0].failure == ""

    def test_workers_are_replaced_one_by_one_and_lose_no_request(self, host: Host, tmp_path: Path) -> None:
        host.serve("steps-1.0.mar")
        host.until(lambda: host.sockets)
        before, answers = host.pids(), list[str]()
        gate = tmp_path / "gate"
        inside = threading.Thread(target=lambda: answers.append(host.ask(f"gate {gate}").json()))
        inside.start()
        host.until(lambda: gate.with_name("gate.begun").exists())
        host.workers.restart(KEY)
        seen: list[int] = []
        host.until(lambda: seen.append(len(host.sockets)) or set(host.pids()).isdisjoint(before))

        assert min(seen) == 1  # there is always one that answers
        host.workers = Workers(host.state)  # another keeper knows that it has a request inside
        for _ in range(10):
            host.workers.look()
        assert processes.runs(before[0])  # until the request inside is answered
        assert host.ask("new").json() == "NEW"
        gate.touch()
        inside.join(WITHIN_S)
        host.until(lambda: not processes.runs(before[0]))
        assert answers == [f"GATE {gate}".upper()]

    def test_a_version_that_is_not_served_any_more_leaves_nothing(self, host: Host) -> None:
        host.serve("steps-1.0.mar")
        host.until(lambda: host.sockets)
        pid = host.pids()[0]
        host.file.change(lambda now: replace(now, versions=(), defaults={}))

        host.until(lambda: not processes.runs(pid))
        host.until(lambda: not WorkerProcess.all(host.state))
        assert not list((host.state.direct / "models").iterdir())


class TestManagement:
    @pytest.fixture
    def client(self, host: Host) -> Iterator[RestClient]:
        management_app.serve(host.state, Management(host.state, host.workers), lambda: "page")
        path = host.state.direct / MANAGEMENT
        deadline = time.monotonic() + WITHIN_S
        while not _answers(path):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        key = KeyFile.read(host.state.key_file).management
        with RestClient("http://x:1", "http://x:1", management_token=key, transport=SocketTransport(path)) as found:
            yield found

    def test_versions_come_and_go(self, host: Host, client: RestClient) -> None:
        for name in ("steps-1.0.mar", "steps-2.0.mar"):
            client.register(host.copy(name).path.name)
        (model,) = client.models()

        assert [one.version for one in model.versions] == ["1.0", "2.0"]
        assert model.default.version == "1.0"
        assert not model.default.ready
        with pytest.raises(ServingError, match="Cannot remove default version"):
            client.unregister("steps", "1.0")
        client.set_default("steps", "2.0")
        client.unregister("steps", "1.0")
        assert [one.default.version for one in client.models()] == ["2.0"]
        host.until(lambda: client.models()[0].default.ready)
        assert client.describe("steps")["customizedMetadata"]["protocol"]

    @pytest.mark.parametrize(
        ("ask", "said"),
        [
            (lambda client: client.register("nothing.mar"), "not among the server's copies"),
            (lambda client: client.register("../hosted.json"), "not among the server's copies"),
            (lambda client: client.set_default("steps", "9.0"), "Model not found: steps"),
            (lambda client: client.describe("steps"), "Model not found: steps"),
        ],
    )
    def test_what_is_not_there_is_said(
        self, host: Host, client: RestClient, ask: Callable[[RestClient], object], said: str
    ) -> None:
        with pytest.raises(ModelNotFound, match=said):
            ask(client)

    def test_the_same_archive_twice_is_a_conflict(self, host: Host, client: RestClient) -> None:
        client.register(host.copy("steps-1.0.mar").path.name)
        with pytest.raises(ServingError, match="already registered"):
            client.register(host.copy("steps-1.0.mar").path.name)

    def test_an_archive_of_another_protocol_is_refused(self, host: Host, client: RestClient) -> None:
        earlier = host.state.archives / "count_words-1.0.0.mar"
        host.state.archives.mkdir(exist_ok=True)
        shutil.copy(Path(__file__).parents[1] / "data" / "count_words-1.0.mar", earlier)
        with pytest.raises(RequestRefused, match="and a host of this torchserve-dag needs protocol"):
            client.register(earlier.name)

    def test_nothing_is_managed_without_the_key(self, host: Host, client: RestClient) -> None:
        with httpx.Client(transport=SocketTransport(host.state.direct / MANAGEMENT)) as http:
            for headers in ({}, {"authorization": "Bearer other"}):
                answer = http.get("http://keeper/models", headers=headers)
                assert (answer.status_code, answer.json()["type"]) == (400, "InvalidKeyException")
            assert http.get("http://keeper/ping").json() == {"status": "Healthy"}
            assert http.get("http://keeper/metrics").text == "page"
            assert http.get("http://keeper/nothing").status_code == 404

    def test_calls_over_grpc(self, host: Host, client: RestClient) -> None:
        client.register(host.copy("steps-1.0.mar").path.name)
        with httpx.Client(transport=SocketTransport(host.state.direct / MANAGEMENT)) as http:
            asked = management_pb2.DescribeModelRequest(model_name="steps")
            found = _call(http, "DescribeModel", asked)
            assert (
                json.loads(management_pb2.ManagementResponse.FromString(found.content[5:]).msg)[0]["modelVersion"]
                == "1.0"
            )
            asked.model_name = "other"
            failed = _call(http, "DescribeModel", asked)
            assert (failed.status_code, failed.headers["grpc-status"], failed.content) == (404, "5", b"")
            assert failed.headers["grpc-message"] == "Model not found: other"
            nothing = _call(http, "Nothing", asked)
            assert nothing.headers["grpc-status"] == "12"
            health = http.post(f"http://keeper{management_app.HEALTH_CHECK}", content=grpc.framed(b""))
            assert health.content == grpc.framed(management_app.NOT_SERVING)  # no worker is ready yet


def _call(http: httpx.Client, name: str, message: Any) -> httpx.Response:
    content, headers = grpc.framed(message.SerializeToString()), {"authorization": "Bearer manage"}
    return http.post(f"http://keeper{management_app.SERVICE}{name}", content=content, headers=headers)


def _answers(path: Path) -> bool:
    try:
        with httpx.Client(transport=SocketTransport(path)) as http:
            return http.get("http://keeper/ping").status_code in {200, 503}
    except (OSError, httpx.HTTPError):
        return False


class TestCalls:
    def test_options_of_a_call_are_those_of_a_request(self) -> None:
        assert grpc.OPTIONS | grpc.OWN == options.NAMES

    def test_entries_are_parts_or_options(self) -> None:
        call = inference_pb2.PredictionsRequest(
            model_name="m",
            model_version="2.0",
            input={"body": b"x", "X-Priority": b"bulk", "content-type": b"text/plain", "x-door-token": b"bob"},
        )
        headers = {"x-door-token": "alice", "x-priority": "interactive", "grpc-timeout": "1500m"}
        name, version, request = grpc.request_in(grpc.framed(call.SerializeToString()), headers, "new")

        assert (name, version, request.id) == ("m", "2.0", "new")
        assert (request.body, request.content_type, request.parts) == (b"x", "text/plain", None)
        assert request.options["x-priority"] == "bulk"
        assert request.options["x-timeout-ms"] == "1500"
        assert request.options["x-door-token"] == "alice"

    @pytest.mark.parametrize("body", [b"", b"\0\0\0\0", b"\1\0\0\0\1x", b"\0\0\0\0\2x", grpc.framed(b"\xff\xff")])
    def test_what_is_no_call_is_refused(self, body: bytes) -> None:
        with pytest.raises(grpc.NotGrpcError):
            grpc.request_in(body, {}, "new")

    @pytest.mark.parametrize(
        ("text", "ms"),
        [("5S", "5000"), ("1n", "1"), ("100m", "100"), ("2H", "7200000"), ("x", None), ("123456789S", None)],
    )
    def test_a_deadline_is_a_time_limit(self, text: str, ms: str | None) -> None:
        assert grpc.time_limit(text).get("x-timeout-ms") == ms

    @pytest.mark.parametrize(
        "fields",
        [
            {"message": "half of a character: \ud800", "x": "\ud800"},
            {"message": "short", "x": "y" * 200_000},
            {"message": "long " * 40_000},
            {"message": "\u20ac" * 40_000},
        ],
        ids=["surrogate", "large field", "long message", "long message of wide characters"],
    )
    def test_headers_of_a_failure_are_never_more_than_envoy_takes(self, fields: dict[str, str]) -> None:
        headers = grpc.failure_headers(ServiceResponse(json.dumps(fields).encode(), status=422))

        assert headers["grpc-status"] == "3"
        assert unquote(headers["grpc-message"])[:5] == fields["message"][:5]
        assert sum(map(len, headers.values())) < 30_000
        assert all(value.isascii() and value.isprintable() for value in headers.values())

    @pytest.mark.parametrize("body", [b"not found", b'["a"]', '{"message": "\u00e9"}'.encode(), b'{\n"message": "m"}'])
    def test_whatever_a_handler_writes_of_its_failure_is_a_status(self, body: bytes) -> None:
        headers = grpc.failure_headers(ServiceResponse(body, status=404))

        assert headers["grpc-status"] == "5"
        assert all(value.isascii() and value.isprintable() for value in headers.values())

    @pytest.mark.parametrize("named", ["a\nb", "", "x" * 200, "\u00fc"])
    def test_an_id_that_fits_no_header_is_replaced(self, named: str) -> None:
        call = inference_pb2.PredictionsRequest(model_name="m", input={"body": b"x", "x-request-id": named.encode()})
        _, _, request = grpc.request_in(grpc.framed(call.SerializeToString()), {}, "new")

        assert request.id == "new"

    def test_a_failure_is_a_status_with_its_sentence(self) -> None:
        body = json.dumps({"code": 422, "type": "InputError", "message": "zu groß: 100 %", "request_id": "r"}).encode()
        headers = grpc.failure_headers(ServiceResponse(body, status=422))

        assert headers["grpc-status"] == "3"
        assert headers["grpc-message"] == "zu gro%C3%9F: 100 %25"
        assert json.loads(headers["x-failure"])["type"] == "InputError"
        padded = headers["grpc-status-details-bin"] + "=="
        status, info = Status.FromString(base64.b64decode(padded)), ErrorInfo()
        assert status.details[0].Unpack(info)
        assert (status.code, status.message, info.reason) == (3, "zu groß: 100 %", "InputError")
        assert info.metadata == {"code": "422", "request_id": "r"}


@pytest.mark.parametrize(("asynchronous", "most"), [(False, 30), (True, None)])
def test_as_many_requests_may_be_inside_as_torchserve_lets_in(asynchronous: bool, most: int | None) -> None:  # noqa: FBT001
    one = HostedVersion("m", "1.0", "m.mar", 1, batch_size=10, queue=20, asynchronous=asynchronous)
    assert one.most == most


def test_keys_are_written_as_torchserve_does(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.prepare()
    planned = direct_host.LaunchPlan(tmp_path / "config.properties", {}, tmp_path, Addresses())
    ports = direct_host.ports(state, planned)

    assert KeyFile.read(state.key_file).inference == ports.key
    assert state.key_file.stat().st_mode & 0o777 == 0o600
