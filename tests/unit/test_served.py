"""Served nodes against a real gRPC server that answers as TorchServe does; the live tests hold it to that."""

# ruff: noqa: N802, S104, S106 (the stubs' names, the other name of this host, and names of variables)

from __future__ import annotations

import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from PIL import Image

from tests.unit.conftest import Write
from torchserve_dag import Workflow
from torchserve_dag.front_door import certificate
from torchserve_dag.front_door.settings import FrontDoor
from torchserve_dag.runtime.compute import cores
from torchserve_dag.runtime.data import codec
from torchserve_dag.runtime.data.options import PRIORITY, TIMEOUT, TRACE, Options
from torchserve_dag.runtime.data.parts import Body, message_in, read
from torchserve_dag.runtime.engine.outcome import FINAL, WORTH_RETRYING
from torchserve_dag.runtime.graph.kinds import ServedCode
from torchserve_dag.runtime.messages import Failure, Label, Labels, Photo, Text
from torchserve_dag.runtime.models.served import ServedModel
from torchserve_dag.runtime.protos import inference_pb2, inference_pb2_grpc

JAVA = "org.pytorch.serve"
REFUSED = "Token Authorization failed. Token either incorrect, expired, or not provided correctly"
ABORTS = {
    "nobody": (grpc.StatusCode.INTERNAL, f"Model not found: nobody\n{JAVA}.archive.model.ModelNotFoundException"),
    "version": (
        grpc.StatusCode.INTERNAL,
        f"Model version: 9.0 does not exist …\n{JAVA}.archive.model.ModelVersionNotFoundException",
    ),
    "busy": (grpc.StatusCode.INTERNAL, 'Model "busy" has no worker to serve …\nInternalServerException.()'),
    "raises": (grpc.StatusCode.UNAVAILABLE, f"Prediction failed\n{JAVA}.http.InternalServerException"),
    "killed": (grpc.StatusCode.INTERNAL, f"Worker died.\n{JAVA}.http.InternalServerException"),
    "killed too": (grpc.StatusCode.RESOURCE_EXHAUSTED, f"Worker died.\n{JAVA}.http.InternalServerException"),
    "limited": (grpc.StatusCode.RESOURCE_EXHAUSTED, "local_rate_limited"),
    "locked": (grpc.StatusCode.PERMISSION_DENIED, REFUSED),
    "large": (grpc.StatusCode.CANCELLED, "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))"),
    "lost": (grpc.StatusCode.UNAVAILABLE, "Socket closed"),
}
BODIES = {
    "refuses": codec.encode(Failure(415, "The body is not a photo.", "InputError", "detect"))[0],
    "fails": codec.encode(Failure(503, "Try later.", "Overloaded"))[0],
    "wrong": b'{"labels": 3}',
    "empty": b"",
}


class Inference(inference_pb2_grpc.InferenceAPIsServiceServicer):
    """Does what the model's name says."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.inside = threading.Semaphore(0)
        """Released by every call that hangs."""
        self.cancelled = threading.Semaphore(0)
        """Released by every call that hung and was cancelled."""
        self.go_on = threading.Event()

    def Predictions(self, request: Any, context: Any) -> Any:
        name = request.model_name
        self.seen.append(
            {
                "input": dict(request.input),
                "version": request.model_version,
                "metadata": dict(context.invocation_metadata()),
                "left_s": context.time_remaining(),
                "peer": context.peer(),
            }
        )
        if name in ABORTS:
            context.abort(*ABORTS[name])
        if name == "hangs":
            context.add_callback(lambda: None if self.go_on.is_set() else self.cancelled.release())
            self.inside.release()
            self.go_on.wait(30)
        body = request.input["body"]
        if name == "big":
            body = b"x" * int(body)
        return inference_pb2.PredictionResponse(prediction=BODIES.get(name, body))


Serve = Callable[..., tuple[str, Inference, grpc.Server]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server; gives its address, what it does, and itself."""
    running: list[tuple[grpc.Server, Inference]] = []

    def start(
        address: str = "127.0.0.1:0", tls: grpc.ServerCredentials | None = None
    ) -> tuple[str, Inference, grpc.Server]:
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ]
        server, inference = grpc.server(ThreadPoolExecutor(16), options=options), Inference()
        inference_pb2_grpc.add_InferenceAPIsServiceServicer_to_server(inference, server)
        port = server.add_secure_port(address, tls) if tls else server.add_insecure_port(address)
        server.start()
        running.append((server, inference))
        return f"127.0.0.1:{port}", inference, server

    yield start
    for server, inference in running:
        inference.go_on.set()
        server.stop(None).wait()


@pytest.fixture
def call() -> Iterator[Callable[..., ServedModel]]:
    models: list[ServedModel] = []

    def model(
        address: str,
        name: str = "echo",
        gives: Any = Any,
        version: str | None = None,
        token: str | None = None,
        ca: str | None = None,
    ) -> ServedModel:
        models.append(ServedModel(ServedCode(name, version, address, token, ca), gives))
        return models[-1]

    yield model
    for one in models:
        one.close()


class Answers:
    """Collects what `done` is called with."""

    def __init__(self) -> None:
        self._said: queue.Queue[Any] = queue.Queue()
        self.count = 0

    def done(self, answer: Any) -> None:
        self.count += 1
        self._said.put(answer)

    def next(self) -> Any:
        return self._said.get(timeout=60)


def ask(model: ServedModel, value: Any = b"1", timeout_s: float = 10) -> Any:
    answers = Answers()
    model(value, Options(timeout_s=timeout_s), answers.done)
    return answers.next()


def dead_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


WITHIN_20_S = Options(timeout_s=20)
DOWN_S = 6.0
RECONNECTS_WITHIN_S = 2.5
"""By itself grpc would wait longer and longer: after this long a failure, for 4 s, and at last for two minutes."""
PHOTO = Photo(Image.radial_gradient("L").convert("RGB"))
LARGE_PHOTO = Photo(PHOTO.image.resize((2000, 1500)))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Labels([Label("espresso", 0.8)]), Labels),
        (Text("Grüße"), Text),
        (Text('{"text": "looks like JSON"}'), Text),
        (PHOTO, Photo),
        (LARGE_PHOTO, Photo),
        (b"\x00\xff", bytes),
        ([1, 2], list[int]),
    ],
)
def test_what_is_sent_is_what_our_own_server_reads(serve: Serve, call: Any, value: Any, kind: Any) -> None:
    address, inference, _ = serve()
    ask(call(address), value)

    body = inference.seen[0]["input"]["body"]

    assert codec.encode(codec.decode(kind, body)) == codec.encode(value)
    assert len(body) < 6_553_500  # what TorchServe takes unless it is told otherwise


@dataclass(frozen=True)
class Captioned:
    photo: Photo
    caption: str
    count: int = 1
    mask: Photo | None = None


def test_a_message_that_json_cannot_hold_is_sent_in_parts(serve: Serve, call: Any) -> None:
    address, inference, _ = serve()
    ask(call(address), Captioned(PHOTO, "a cat", 2))
    sent = inference.seen[0]["input"]
    del sent[TIMEOUT]

    message, parameters = message_in(Captioned, {name: Body(content) for name, content in sent.items()})
    got = read(Captioned, message)
    assert (got.caption, got.count, got.mask, parameters) == ("a cat", 2, None, {})
    assert codec.encode(got.photo) == codec.encode(PHOTO)


@pytest.mark.parametrize(
    ("body", "gives", "answer"),
    [
        (codec.encode(Labels([Label("a", 1.0)]))[0], Labels, Labels([Label("a", 1.0)])),
        (codec.encode(Text("ours"))[0], Text, Text("ours")),
        (b"another's", Text, Text("another's")),
        (codec.encode(PHOTO)[0], Photo, PHOTO),
        (b"", bytes, b""),
        (b'{"a": [1]}', Any, {"a": [1]}),
        (b"no JSON", Any, b"no JSON"),
        (b"", Any, b""),
    ],
)
def test_an_answer_is_the_message_that_the_workflow_says(
    serve: Serve, call: Any, body: bytes, gives: Any, answer: Any
) -> None:
    address, _, _ = serve()

    assert ask(call(address, gives=gives), body) == answer


def test_the_call_says_which_version_and_how_long_it_may_take(serve: Serve, call: Any) -> None:
    address, inference, _ = serve()
    ask(call(address, version="2.0"), timeout_s=7.5)

    assert inference.seen[0]["version"] == "2.0"
    assert inference.seen[0]["input"] == {"body": b"1", TIMEOUT: b"7500"}
    assert 6 < inference.seen[0]["left_s"] < 8


@pytest.mark.parametrize(
    ("model", "status", "kind", "says", "again"),
    [
        ("nobody", 502, "ModelNotFound", "Model not found: nobody", False),
        ("version", 502, "ModelNotFound", "Model version: 9.0 does not exist", False),
        ("busy", 503, "Overloaded", "no worker, or no room", True),
        ("raises", 502, "ServedModelFailed", "its server's log says why: Prediction failed.", True),
        ("killed", 502, "ServedModelFailed", "Worker died.", True),
        ("killed too", 502, "ServedModelFailed", "Worker died.", True),
        ("limited", 503, "Overloaded", "local_rate_limited", True),
        ("locked", 502, "Unauthorized", "name the environment variable that holds the right token", False),
        ("large", 413, "TooLarge", "no body of 1 bytes", False),
        ("lost", 503, "Unreachable", "Socket closed", True),
        ("refuses", 415, "InputError", "The body is not a photo. (detect of refuses/1.0 at 127", False),
        ("fails", 503, "Overloaded", "Try later. (fails/1.0 at 127", True),
        ("wrong", 502, "UnexpectedAnswer", "not JSON with the keys labels", True),
        ("empty", 502, "UnexpectedAnswer", "The body is empty", True),
    ],
)
def test_a_failure_has_a_status_a_type_and_a_sentence(
    serve: Serve, call: Any, model: str, status: int, kind: str, says: str, *, again: bool
) -> None:
    address, _, _ = serve()
    failure = ask(call(address, model, Labels, "1.0"))

    assert isinstance(failure, Failure)
    assert (failure.status, failure.type, failure.node) == (status, kind, None)
    assert says in failure.message
    assert address in failure.message
    assert (status in WORTH_RETRYING and kind not in FINAL) == again


def test_another_service_at_the_address_is_no_torchserve(call: Any) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        failure = ask(call(f"127.0.0.1:{port}"))
    finally:
        server.stop(None).wait()

    assert (failure.status, failure.type) == (502, "ModelNotFound")
    assert failure.type in FINAL


def test_a_call_does_not_wait_and_many_are_under_way_together(serve: Serve, call: Any) -> None:
    address, inference, _ = serve()
    model, answers = call(address, "hangs"), Answers()
    for number in range(8):
        model(str(number).encode(), WITHIN_20_S, answers.done)  # would not return if it waited: nothing is answered yet
    for _ in range(8):
        assert inference.inside.acquire(timeout=60)
    assert answers.count == 0
    inference.go_on.set()

    assert sorted(answers.next() for _ in range(8)) == list(range(8))
    assert len({seen["peer"] for seen in inference.seen}) == 1


def test_a_call_that_takes_too_long_is_answered_at_its_limit(serve: Serve, call: Any) -> None:
    address, _, _ = serve()
    begun = time.monotonic()
    failure = ask(call(address, "hangs"), timeout_s=0.3)

    assert (failure.status, failure.type) == (504, "Timeout")
    assert "0.3 s" in failure.message
    assert 0.3 <= time.monotonic() - begun < 15


def test_calling_off_reaches_the_server_and_is_answered_once(serve: Serve, call: Any) -> None:
    address, inference, _ = serve()
    answers = Answers()
    cancel = call(address, "hangs")(b"1", WITHIN_20_S, answers.done)
    assert inference.inside.acquire(timeout=60)
    cancel()
    cancel()

    assert answers.next().type == "Cancelled"
    assert inference.cancelled.acquire(timeout=60)
    assert ask(call(address)) == 1  # by then a second answer would have come
    assert answers.count == 1


def test_closing_calls_off_its_own_calls_and_not_its_neighbours(serve: Serve, call: Any) -> None:
    address, inference, _ = serve()
    one, other = call(address, "hangs"), call(address, "hangs")
    ended, waiting = Answers(), Answers()
    one(b"1", WITHIN_20_S, ended.done)
    other(b"2", WITHIN_20_S, waiting.done)
    assert inference.inside.acquire(timeout=60)
    assert inference.inside.acquire(timeout=60)
    one.close()
    one.close()

    assert ended.next().type == "Cancelled"
    inference.go_on.set()
    assert waiting.next() == 2


def test_all_who_call_one_address_share_a_connection_until_the_last_has_left(serve: Serve, call: Any) -> None:
    address, inference, _ = serve()
    models = [call(address), call(address, "other"), call(address)]
    assert [ask(model) for model in models] == [1, 1, 1]
    assert len({seen["peer"] for seen in inference.seen}) == 1

    process = psutil.Process()
    port = int(address.rpartition(":")[2])
    for model in models:
        assert any(c.raddr and c.raddr.port == port for c in process.net_connections("tcp"))
        model.close()
    wait_until(lambda: not any(c.raddr and c.raddr.port == port for c in process.net_connections("tcp")))
    assert ask(call(address)) == 1


def test_a_server_that_restarts_is_found_again(serve: Serve, call: Any) -> None:
    address, _, server = serve()
    model = call(address)
    assert ask(model) == 1
    server.stop(None).wait()
    begun, failures = time.monotonic(), []
    while time.monotonic() < begun + DOWN_S:
        failures.append(ask(model))
    serve(address)
    begun = time.monotonic()
    while isinstance(answer := ask(model), Failure):
        failures.append(answer)
        assert time.monotonic() - begun < 60, answer

    assert answer == 1
    assert {(failure.status, failure.type) for failure in failures} == {(503, "Unreachable")}
    assert time.monotonic() - begun < RECONNECTS_WITHIN_S


def test_a_dead_address_costs_neither_threads_nor_files(call: Any) -> None:
    address = dead_address()
    process = psutil.Process()

    def failed(count: int) -> None:
        for _ in range(count):
            model = call(address)
            assert ask(model).type == "Unreachable"
            model.close()
        staying = call(address)
        assert all(ask(staying).type == "Unreachable" for _ in range(count))
        staying.close()

    failed(20)  # grpc starts threads of its own, once
    before = process.num_threads(), process.num_fds()
    failed(200)

    wait_until(lambda: process.num_threads() <= before[0] + 2)
    wait_until(lambda: process.num_fds() <= before[1] + 2)


def test_photos_are_not_decoded_while_those_of_other_requests_fill_the_memory(serve: Serve, tmp_path: Path) -> None:
    """A node that runs elsewhere takes no lane, so that nothing else would hold the decoding back."""
    address, inference, _ = serve()
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows" / "flow.yaml").write_text(
        f"""
name: flow
version: "1.0"
does: A test.
nodes:
  far: {{served: {{model: hangs, at: "{address}", takes: Photo, gives: Photo}}}}
output: far
serve: {{pixels_inside: {2 * 300 * 300}}}
"""
    )
    photo = codec.encode(Photo(Image.effect_noise((300, 300), 50).convert("RGB")))[0]
    with Workflow.load(tmp_path / "workflows" / "flow.yaml") as workflow:
        requests = [workflow.submit(photo) for _ in range(40)]
        for _ in range(2):
            assert inference.inside.acquire(timeout=60)
        # Each lane may have begun one more before the second was decoded.
        most = 1 + cores.cores()
        time.sleep(0.3)
        assert 2 <= workflow.counts()["request"].items <= most
        requests[0].cancel()
        inference.go_on.set()
        answers = [request.future.result(60) for request in requests]

        assert answers[0].status == 499
        assert [answer.width for answer in answers[1:]] == [300] * 39
        assert not workflow.engine._decoding.paused
        assert workflow.engine._admission._pixels == 0


def test_large_bodies_go_both_ways(serve: Serve, call: Any) -> None:
    address, _, _ = serve()

    assert len(ask(call(address, "big", bytes), b"30000000", 30)) == 30_000_000
    assert len(ask(call(address, gives=bytes), b"x" * 30_000_000, 30)) == 30_000_000


def test_what_cannot_be_written_is_a_failure_and_no_exception(serve: Serve, call: Any) -> None:
    address, inference, _ = serve()
    failure = ask(call(address), object())

    assert (failure.status, failure.type) == (500, "InternalError")
    assert not inference.seen


def test_the_token_comes_from_the_environment(serve: Serve, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    address, inference, _ = serve()
    monkeypatch.setenv("THEIR_TOKEN", "secret")
    ask(call(address, token="THEIR_TOKEN"))
    failure = ask(call(address, "locked", token="THEIR_TOKEN"))

    assert inference.seen[0]["metadata"]["authorization"] == "Bearer secret"
    assert "the environment variable THEIR_TOKEN" in failure.message
    assert "secret" not in failure.message


def test_a_server_with_tls_is_called_where_its_certificate_is_trusted(
    serve: Serve, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem, key = certificate.files(tmp_path, FrontDoor(), tmp_path)
    address, inference, _ = serve(tls=grpc.ssl_server_credentials([(key.read_bytes(), pem.read_bytes())]))
    address = address.replace("127.0.0.1", "https://localhost")
    monkeypatch.setenv("THEIR_CA", str(pem))
    monkeypatch.setenv("THEIR_TOKEN", "secret")

    assert ask(call(address, token="THEIR_TOKEN", ca="THEIR_CA")) == 1
    assert inference.seen[0]["metadata"]["authorization"] == "Bearer secret"
    unknown = ask(call(address, token="THEIR_TOKEN"))
    assert (unknown.status, unknown.type) == (503, "Unreachable")
    assert len(inference.seen) == 1, "nothing is sent to a server whose certificate nobody vouches for"


@pytest.mark.parametrize(
    ("there", "says"), [(None, "cannot be read: No such file"), ("no certificate", "holds no certificate in PEM form")]
)
def test_a_file_without_certificates_is_said_at_load(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str | None, says: str
) -> None:
    monkeypatch.setenv("THEIR_CA", str(tmp_path / "ca.pem"))
    if there:
        (tmp_path / "ca.pem").write_text(there)
    with pytest.raises(ValueError, match=says):
        call("https://localhost:1", ca="THEIR_CA")


def test_the_model_gets_the_priority_the_span_and_the_time_of_its_client(
    serve: Serve, project: Path, write: Write
) -> None:
    address, inference, _ = serve()
    write(f'answer: {{served: {{model: echo, at: "{address}", takes: bytes, gives: bytes}}}}', "")
    span = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with Workflow.load(project / "workflows/flow.yaml") as workflow:
        asked = Options(timeout_s=5, priority="bulk", trace=span, cancel_key="mine", request_id="r-1")
        answer = workflow.engine.submit(Body(b"hi", None), options=asked).future.result(60)

    assert answer == b"hi"
    sent = inference.seen[0]["input"]
    assert 0 < int(sent.pop(TIMEOUT)) <= 5000
    assert sent == {"body": b"hi", PRIORITY: b"bulk", TRACE: span.encode()}


def test_a_token_that_is_not_there_is_said_at_load(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THEIR_TOKEN", raising=False)

    with pytest.raises(ValueError, match=r"THEIR_TOKEN, for the token of 127\.0\.0\.1:1, is not set"):
        call("127.0.0.1:1", token="THEIR_TOKEN")


def keys(token: str) -> str:
    return json.dumps({"inference": {"key": token}, "management": {"key": "other"}})


def test_the_token_of_a_server_here_is_that_of_its_last_start(
    serve: Serve, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, inference, _ = serve()
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".torchserve-dag").mkdir()
    file = tmp_path / ".torchserve-dag" / "key_file.json"
    model = call(address)
    for token in ("first", "second"):
        file.write_text(keys(token))
        ask(model)
    failure = ask(call(address, "locked"))
    file.write_text("")  # TorchServe makes it empty, and then fills it

    assert ask(model) == 1
    assert [seen["metadata"].get("authorization") for seen in inference.seen[:2]] == ["Bearer first", "Bearer second"]
    assert "refuses the token in .torchserve-dag/key_file.json" in failure.message


def test_a_token_of_this_host_stays_on_it(
    serve: Serve, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, inference, _ = serve()
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".torchserve-dag").mkdir()
    (tmp_path / ".torchserve-dag" / "key_file.json").write_text(keys("mine"))
    ask(call(address.replace("127.0.0.1", "0.0.0.0")))  # the same server, by a name that is not loopback's
    ask(call(address))

    assert [seen["metadata"].get("authorization") for seen in inference.seen] == [None, "Bearer mine"]


def test_a_worker_finds_the_tokens_in_the_folder_of_its_torchserve(serve: Serve, tmp_path: Path) -> None:
    """A worker's parent process is its TorchServe, which writes them into its working directory."""
    address, inference, _ = serve()
    (tmp_path / "key_file.json").write_text(keys("ours"))
    (tmp_path / "model").mkdir()
    worker = (
        "import sys, threading\n"
        "from torchserve_dag.runtime.data.options import Options\n"
        "from torchserve_dag.runtime.graph.kinds import ServedCode\n"
        "from torchserve_dag.runtime.models.served import ServedModel\n"
        "ended = threading.Event()\n"
        "ServedModel(ServedCode('echo', None, sys.argv[1], None), bytes)(\n"
        "    b'1', Options(timeout_s=20), lambda answer: ended.set())\n"
        "assert ended.wait(20)\n"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}, sys.argv[1]], cwd='model', check=True)"
    subprocess.run([sys.executable, "-c", parent, address], cwd=tmp_path, check=True, timeout=500)

    assert inference.seen[0]["metadata"]["authorization"] == "Bearer ours"


def test_without_grpc_a_workflow_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(ImportError, match=r"a node that calls 127\.0\.0\.1:7070 over gRPC needs grpcio, protobuf and"):
        ServedModel(ServedCode("echo", None, "127.0.0.1:7070", None), bytes)


def wait_until(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.02)
