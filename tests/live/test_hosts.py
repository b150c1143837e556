"""What docs/hosts.md says of the direct host, on a real one: behind Envoy, with its own ports and the front door."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from typer.testing import CliRunner

from tests.foreign_archives import TOLD, ask, manifest
from tests.live.conftest import ROOT, Serving, run_tool, serve_files
from torchserve_dag.clients import KeyFile, ServingError
from torchserve_dag.commands import app
from torchserve_dag.front_door.door import Door
from torchserve_dag.front_door.start import own_token
from torchserve_dag.runtime.messages import Text
from torchserve_dag.runtime.protos.inference_pb2 import PredictionResponse, PredictionsRequest
from torchserve_dag.server import processes
from torchserve_dag.server.connect import management_client, running
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.ports import host_and_port
from torchserve_dag.server.state import State
from torchserve_dag.server.supervised import Role, Supervised
from torchserve_dag.stack.connect import client, local_address

PREDICTIONS = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
WITHIN_S = 120
LEAVING = 20

FILES: dict[str, str | Path] = {
    "workflows/steps.yaml": """
        name: steps
        version: "1.0"
        does: Two steps, of which the first may wait.
        nodes:
          first: {function: first}
          second: {function: second, inputs: {text: first}}
        output: second
        serve: {timeout_s: 60}
        """,
    "workflows/steps.py": """
        import time
        from pathlib import Path
        from torchserve_dag import InputError, Text

        def first(request: Text) -> Text:
            if request.text == "bad":
                raise InputError("That text is bad.", 422)
            if request.text.startswith("gate "):
                gate = Path(request.text.removeprefix("gate "))
                gate.with_name(gate.name + f".begun-{time.monotonic_ns()}").touch()
                while not gate.exists():
                    time.sleep(0.01)
            return request

        def second(text: Text) -> str:
            if text.text.startswith("gate "):
                Path(text.text.removeprefix("gate ") + ".second").touch()
            return text.text.upper()
        """,
    "workflows/other.yaml": """
        name: other
        version: "1.0"
        does: Nobody disturbs it.
        nodes: {upper: {function: upper}}
        output: upper
        """,
    "workflows/other.py": """
        from torchserve_dag import Text

        def upper(request: Text) -> str:
            return request.text.upper()
        """,
}

HELD_BY = {
    "a client that leaves": ("test_a_client_that_leaves_ends_its_request",),
    "a worker that is killed": ("test_a_worker_that_is_killed_costs_what_is_inside_and_is_replaced",),
    "a failure over gRPC, at the host's own port": ("test_a_failure_over_grpc_is_a_status",),
    "`StreamPredictions`": ("modes/test_streaming.py::test_calls_over_grpc_that_do_not_ask_for_chunks_get_the_whole",),
    "[Open Inference Protocol](open-inference.md), `grpc.health.v1`": (
        "test_health_over_grpc",
        "test_open_inference.py::test_tritonclient_calls_it_through_envoy",
    ),
    "a token that sends all the requests there is room for": ("../unit/test_dev.py::TestEntrance",),
    "`torchserve-dag restart NAME`": ("test_workers_are_replaced_under_load_and_no_request_is_lost",),
    "archives of another protocol than this package's": (
        "workflows/test_earlier_archive.py::test_the_direct_host_leaves_it_out_and_serves_the_rest",
    ),
    "`serve.mode`": ("modes/test_modes.py::test_answers_failures_and_descriptions_are_the_same",),
    "`StreamPredictions2`, `/explanations`, TorchServe's own `.war`": ("test_what_it_does_not_have_is_said",),
    "an unedited TorchServe archive in `asyncCommunication`, or for `torchrun`": (
        "test_an_unedited_archive_is_served_and_what_cannot_be_is_said",
    ),
}
"""Row of the page's table → the tests that hold it."""


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    root = tmp_path_factory.mktemp("hosts")
    (root / "archives").mkdir()
    for name, settings in {"told": "", "streamed": "asyncCommunication: true\n"}.items():
        with zipfile.ZipFile(root / "archives" / f"{name}.mar", "w") as packed:
            packed.writestr("MAR-INF/MANIFEST.json", manifest(modelName=name, configFile="model-config.yaml"))
            packed.writestr("handler.py", textwrap.dedent(TOLD))
            packed.writestr("model-config.yaml", settings or "batchSize: 4\n")
    yield from serve_files(request, root, "direct")


def test_each_row_of_the_page_has_its_tests() -> None:
    page = (ROOT / "docs" / "hosts.md").read_text("utf-8").partition("## What differs")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")][1:]

    assert rows == list(HELD_BY)
    for tests in HELD_BY.values():
        for test in tests:
            file, _, name = test.rpartition("::")
            names = {
                getattr(node, "name", "")
                for node in ast.parse((Path(__file__).parent / (file or __file__)).read_text()).body
            }
            assert name in names, test


@pytest.mark.parametrize("way", ["rest", "front door", "grpc"])
def test_a_client_that_leaves_ends_its_request(server: Serving, tmp_path: Path, way: str) -> None:
    gate = tmp_path / "gate"
    leave = [_begin(server, way, f"gate {gate}") for _ in range(LEAVING)]
    _until(lambda: list(tmp_path.glob("gate.begun-*")))
    for one in leave:
        one()
    with management_client(server.state) as keeper:  # the worker knows of it when none of them is inside any more
        _until(lambda: all(v.queued == 0 for m in keeper.models() if m.name == "steps" for v in m.versions))
    begun = len(list(tmp_path.glob("gate.begun-*")))
    gate.touch()
    with server.rest() as rest:
        assert rest.predict("steps", Text("after")) == "AFTER"

    assert not (tmp_path / "gate.second").exists()
    assert len(list(tmp_path.glob("gate.begun-*"))) == begun


def _begin(server: Serving, way: str, text: str) -> Callable[[], object]:
    """Send a request; what is returned leaves."""
    key = KeyFile.read(server.state.key_file).inference
    if way == "grpc":
        channel = grpc.insecure_channel(server.addresses.grpc_inference)
        call = channel.unary_unary(PREDICTIONS, PredictionsRequest.SerializeToString, PredictionResponse.FromString)
        request = PredictionsRequest(model_name="steps", input={"body": text.encode()})
        return call.future(request, metadata=(("authorization", f"Bearer {key}"),)).cancel  # type: ignore[no-any-return]
    if way == "front door":
        record = Door(server.state).record()
        assert record
        trust = ssl.create_default_context(cafile=record.certificate)
        trust.check_hostname = False
        host, port = host_and_port(record.settings.listen)
        connection: HTTPConnection = HTTPSConnection(host, port, context=trust, timeout=WITHIN_S)
        key = own_token(server.state)
    else:
        connection = HTTPConnection(*host_and_port(server.addresses.inference), timeout=WITHIN_S)
    headers = {"authorization": f"Bearer {key}", "content-type": "text/plain"}
    connection.request("POST", "/predictions/steps", text, headers)
    return connection.close


@pytest.mark.parametrize("door", [False, True], ids=["port", "front door"])
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/predictions/other", 200),
        ("PUT", "/predictions/other?a=1", 200),
        ("POST", "/predictions/other/1.0", 200),
        ("POST", "/predictions/other/1.0/and/more?a=1", 200),
        ("POST", "/predictions/%6fther/1%2E0", 200),
        ("POST", "/predictions/other/", 200),
        ("POST", "/models/other/invoke", 200),
        ("POST", "/predictions/other/9.0", 404),
        ("POST", "/predictions/others", 404),
        ("DELETE", "/predictions/other", 405),
        ("OPTIONS", "/predictions/other/1.0", 405),
    ],
)
def test_a_path_names_a_model_in_every_form(server: Serving, door: bool, method: str, path: str, status: int) -> None:  # noqa: FBT001
    """Of a request at the front door, the log names the model, whatever way it took through Envoy."""
    key = KeyFile.read(server.state.key_file).inference
    base, token = _door(server.state) if door else (server.addresses.inference, key)
    named = uuid.uuid4().hex
    headers = {"authorization": f"Bearer {token}", "content-type": "text/plain", "x-request-id": named}
    with httpx.Client(base_url=base, verify=False, headers=headers, timeout=WITHIN_S, trust_env=False) as http:  # noqa: S501
        answer = http.request(method, path, content="a")

    assert answer.status_code == status, answer.text
    if status == 200:
        assert (answer.json(), answer.headers["x-model-version"], answer.headers["x-request-id"]) == ("A", "1.0", named)
        if door:
            log = server.state.logs / "requests.log"
            _until(lambda: named in log.read_text())
            (line,) = [json.loads(one) for one in log.read_text().splitlines() if named in one]
            assert (line["model"], line["version"]) == ("other", "1.0")


def test_a_failure_over_grpc_is_a_status(server: Serving) -> None:
    key = KeyFile.read(server.state.key_file).inference
    with grpc.insecure_channel(server.addresses.grpc_inference) as channel:
        call = channel.unary_unary(PREDICTIONS, PredictionsRequest.SerializeToString, PredictionResponse.FromString)

        def status(model: str, text: str, token: str = key) -> tuple[str, str]:
            request = PredictionsRequest(model_name=model, input={"body": text.encode()})
            with pytest.raises(grpc.RpcError) as failed:
                call(request, metadata=(("authorization", f"Bearer {token}"),), timeout=WITHIN_S)
            return failed.value.code().name, failed.value.details()

        assert status("steps", "bad") == ("INVALID_ARGUMENT", "That text is bad.")
        assert status("nobody", "a")[0] == "NOT_FOUND"
        assert status("steps", "a", "other")[0] == "PERMISSION_DENIED"
        gate = PredictionsRequest(model_name="steps", input={"body": b"gate /nowhere/gate"})
        with pytest.raises(grpc.RpcError) as late:
            call(gate, metadata=(("authorization", f"Bearer {key}"),), timeout=1)
        assert late.value.code().name in {"DEADLINE_EXCEEDED", "INTERNAL"}


def test_health_over_grpc(server: Serving) -> None:
    with grpc.insecure_channel(server.addresses.grpc_inference) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"", timeout=WITHIN_S) == b"\x08\x01"  # SERVING
    with server.grpc() as client:
        assert client.ready()


def test_what_it_does_not_have_is_said(server: Serving) -> None:
    key = KeyFile.read(server.state.key_file).inference
    metadata = (("authorization", f"Bearer {key}"),)
    with grpc.insecure_channel(server.addresses.grpc_inference) as channel:
        both = channel.stream_stream(PREDICTIONS.replace("Predictions", "StreamPredictions2"))
        with pytest.raises(grpc.RpcError) as unknown:
            next(both(iter([b""]), metadata=metadata, timeout=WITHIN_S))
        assert unknown.value.code().name == "UNIMPLEMENTED"
    for path in ("/explanations/steps", "/wfpredict/steps"):
        answer = httpx.post(
            server.addresses.inference + path, headers={"authorization": f"Bearer {key}"}, trust_env=False
        )
        assert (answer.status_code, answer.json()["type"]) == (404, "ResourceNotFoundException")


def test_an_unedited_archive_is_served_and_what_cannot_be_is_said(server: Serving) -> None:
    for name in ("told", "streamed"):
        (server.root / "archives" / f"{name}.mar").rename(server.root / "model_store" / f"{name}.mar")
    run_tool(server.root, "serve", "told")
    key = KeyFile.read(server.state.key_file).inference
    answer = ask(server.addresses.inference, "told", content=b"x", headers={"authorization": f"Bearer {key}"})
    assert answer.json()["row"] == {"body": ["bytearray", "x"]}
    refused = CliRunner().invoke(app, ["serve", "streamed", "--project", str(server.root)])
    assert refused.exit_code == 1
    assert "asyncCommunication" in refused.stderr
    run_tool(server.root, "status")


class Load:
    """Requests of both protocols until it is left; every answer is compared."""

    def __init__(self, server: Serving) -> None:
        self.server = server
        self.answers, self.failures, self.wrong = 0, list[str](), list[str]()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        _until(lambda: self.answers > 20)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(WITHIN_S)

    def _run(self, number: int) -> None:
        with client(self.server.state, ("rest", "grpc")[number % 2], 60) as serving:
            serving.retries = 0
            i = 0
            while not self._over.is_set():
                i += 1
                try:
                    answer = serving.predict("steps", Text(f"mine {number} {i}"))
                except ServingError as error:
                    self.failures.append(f"{error.status} {error.message}")
                    time.sleep(0.01)
                else:
                    self.answers += 1
                    if answer != f"MINE {number} {i}":
                        self.wrong.append(str(answer))


def test_workers_are_replaced_under_load_and_no_request_is_lost(server: Serving) -> None:
    before = _pids(server)
    with Load(server) as load:
        run_tool(server.root, "restart", "steps")
        answers = load.answers
        _until(lambda: load.answers > answers + 20)

    assert not before & _pids(server)
    assert (load.failures, load.wrong) == ([], [])


def test_a_worker_that_is_killed_costs_what_is_inside_and_is_replaced(server: Serving) -> None:
    with Load(server) as load:
        (pid,) = _pids(server)
        runs = _runs(server)
        os.kill(pid, signal.SIGKILL)
        _until(lambda: (now := _pids(server)) and pid not in now)
        answers = load.answers
        _until(lambda: load.answers > answers + 20)
        with server.rest() as rest:
            assert rest.predict("other", Text("a")) == "A"

    assert load.wrong == []
    assert not [failure for failure in load.failures if failure[:3] not in {"502", "503"}]  # 502: in mid-answer
    assert runs > 0
    assert _runs(server) >= runs  # what the dead worker had counted is still counted


@pytest.mark.parametrize("role", ["keeper", "watcher"])
def test_whoever_watches_may_be_killed_and_no_request_is_lost(server: Serving, role: Role) -> None:
    supervised = Supervised(server.state)
    _until(lambda: _pids(server))
    before, workers = supervised.record(role), _pids(server)
    assert before
    with Load(server) as load:
        os.kill(before.pid, signal.SIGKILL)
        _until(lambda: (now := supervised.process(role)) and now.pid != before.pid)
        answers = load.answers
        _until(lambda: load.answers > answers + 20)

    assert (load.failures, load.wrong) == ([], [])
    _until(lambda: _pids(server) == workers)
    assert supervised.process("Envoy")


def test_an_envoy_that_is_killed_is_started_again(server: Serving) -> None:
    supervised = Supervised(server.state)
    before = supervised.record("Envoy")
    assert before
    with Load(server) as load:
        os.kill(before.pid, signal.SIGKILL)
        _until(lambda: (now := supervised.process("Envoy")) and now.pid != before.pid)
        answers = load.answers
        _until(lambda: load.answers > answers + 20)

    assert load.wrong == []


def test_nothing_is_registered_at_the_ports_unless_the_settings_say_so(server: Serving) -> None:
    key = KeyFile.read(server.state.key_file).management
    where, headers = f"{server.addresses.management}/models", {"authorization": f"Bearer {key}"}
    copy = next(server.state.archives.glob("other-*.mar")).name

    assert httpx.get(where, headers=headers, trust_env=False).status_code == 200
    assert httpx.get(where, trust_env=False).status_code == 400
    refused = httpx.post(where, params={"url": copy}, headers=headers, trust_env=False)
    assert (refused.status_code, "enable_model_api" in refused.text) == (405, True)


def test_versions_come_default_and_go_at_the_ports_where_the_settings_allow_it(tmp_path: Path) -> None:
    """As TorchServe's management API has it; what comes to 8080 and to the front door follows."""
    yaml = str(FILES["workflows/other.yaml"])
    _write_project(tmp_path, {"workflows/other-2.0.yaml": yaml.replace('"1.0"', '"2.0"')})
    settings = (tmp_path / "config.properties").read_text()
    for said, now in (("load_models=all", "load_models=other-1.0.mar"), ("model_api=false", "model_api=true")):
        assert said in settings
        settings = settings.replace(said, now)
    (tmp_path / "config.properties").write_text(settings)
    state = State(tmp_path)
    try:
        run_tool(tmp_path, "up", "--free-ports", "--host", "direct")
        where, keys = running(state).addresses, KeyFile.read(state.key_file)
        management = httpx.Client(
            base_url=where.management,
            headers={"authorization": f"Bearer {keys.management}"},
            timeout=WITHIN_S,
            trust_env=False,
        )

        def answers() -> tuple[str, ...]:
            """The versions that answer at 8080 and at the front door, of requests that name none."""
            found = []
            for base, token in ((where.inference, keys.inference), _door(state)):
                headers = {"authorization": f"Bearer {token}", "content-type": "text/plain"}
                with httpx.Client(base_url=base, verify=False, headers=headers, trust_env=False) as http:  # noqa: S501
                    answer = http.post("/predictions/other", content="a")
                assert answer.json() == "A"
                found.append(answer.headers["x-model-version"])
            return tuple(found)

        with management:
            assert answers() == ("1.0", "1.0")
            come = management.post(
                "/models", params={"url": "other-2.0.mar", "initial_workers": 1, "synchronous": "true"}
            )
            assert (come.status_code, answers()) == (200, ("1.0", "1.0")), come.text
            changed = management.put("/models/other/2.0/set-default")
            assert (changed.status_code, answers()) == (200, ("2.0", "2.0")), changed.text
            gone = management.delete("/models/other/1.0")
            assert gone.status_code == 200, gone.text
            assert management.get("/models/other/1.0").status_code == 404
            assert answers() == ("2.0", "2.0")
    finally:
        run_tool(tmp_path, "down")


def _door(state: State) -> tuple[str, str]:
    """The front door's URL, and a token for it."""
    record = Door(state).record()
    assert record
    return f"https://{local_address(record.settings)}", own_token(state)


def _write_project(root: Path, more: Mapping[str, str] | None = None) -> None:
    """A project of the model `other`, in a version or more, built."""
    for folder in ("handlers", "workflows", "model_store"):
        (root / folder).mkdir()
    for name in ("config.properties", "log4j2.xml"):
        shutil.copy(ROOT / name, root)
    for name in ("workflows/other.yaml", "workflows/other.py"):
        (root / name).write_text(textwrap.dedent(str(FILES[name])))
    for name, text in (more or {}).items():
        (root / name).write_text(
            textwrap.dedent(text.replace("name: other\n", "name: other\n        code: other.py\n"))
        )
    run_tool(root, "build")


def test_an_up_that_was_killed_half_way_is_ended_by_the_next(tmp_path: Path) -> None:
    _write_project(tmp_path)
    state, up = State(tmp_path), ("up", "--free-ports", "--host", "direct")
    try:
        with subprocess.Popen([sys.executable, "-m", "torchserve_dag", *up], cwd=tmp_path) as killed:
            _until(lambda: Supervised(state).process("Envoy"))
            killed.kill()
        assert killed.returncode == -signal.SIGKILL
        run_tool(tmp_path, *up)
        with client(state, "rest") as rest:
            assert rest.predict("other", Text("a")) == "A"
    finally:
        run_tool(tmp_path, "down")

    assert processes.family(state) == []


def test_java_is_not_there(server: Serving) -> None:
    names = {process.name() for process in processes.family(server.state)}
    assert not any("java" in name for name in names)


def _pids(server: Serving) -> set[int]:
    """Of the workers of `steps` that are ready."""
    with management_client(server.state) as found:
        every = [version for model in found.models() if model.name == "steps" for version in model.versions]
    return {worker.pid for version in every for worker in version.workers if worker.ready}


def _runs(server: Serving) -> float:
    """How often the first node of `steps` has run, by the page of metrics."""
    key = KeyFile.read(server.state.key_file).inference
    page = httpx.get(
        f"{server.addresses.metrics}/metrics", headers={"authorization": f"Bearer {key}"}, trust_env=False
    ).text
    series = [line for line in page.splitlines() if 'workflow="steps"' in line and 'node="first"' in line]
    return sum(float(line.split()[-1]) for line in series if line.startswith("torchserve_dag_node_items_total"))


def _until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while True:
        try:
            if true():
                return
        except (ServerError, ServingError):  # the keeper is being started again
            pass
        assert time.monotonic() < deadline
        time.sleep(0.02)
