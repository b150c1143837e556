"""Asynchronous mode, as TorchServe's end of the socket sees it: responses one by one, in chunks, and processes that end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ts.context import Context, RequestProcessor
from ts.protocol.otf_message_handler import create_predict_response, retrieve_msg

from tests.unit.conftest import Write
from tests.unit.front_end import REST, WAIT_S, FrontEnd, request
from torchserve_dag.runtime.compat.wire import (
    WireReader,
    WireRequest,
    WireResponse,
    read_requests,
    read_response_heads,
    write_responses,
)
from torchserve_dag.runtime.data.options import read_options
from torchserve_dag.runtime.engine.streaming import MAX_UNTAKEN
from torchserve_dag.runtime.worker.protocol import Part
from torchserve_dag.runtime.worker.service import load
from torchserve_dag.runtime.worker.torchserve.asynchronous import AsynchronousLoop
from torchserve_dag.runtime.worker.torchserve.guard import LOADED
from torchserve_dag.runtime.worker.torchserve.rows import read_request

# The socket's protocol, held against TorchServe's own.


def test_torchserves_own_worker_reads_what_the_front_end_of_these_tests_writes() -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(request("id-1", {"body": b"abc", "by": b"me"}, REST))

    command, (read,) = retrieve_msg(theirs)

    assert (command, read["requestId"]) == (b"I", b"id-1")
    assert {one["name"]: bytes(one["value"]) for one in read["parameters"]} == {"body": b"abc", "by": b"me"}
    assert {bytes(one["name"]).decode() for one in read["headers"]} == set(REST)


def test_a_request_is_read_however_its_bytes_arrive() -> None:
    data = request("id-1", {"body": b"abc"}, REST) + request("id-2", {"body": b"d" * 1000, "by": b"me"}, {})
    expected = [
        [WireRequest("id-1", {"body": b"abc"}, {"body": {"content-type": ""}, **REST})],
        [
            WireRequest(
                "id-2", {"body": b"d" * 1000, "by": b"me"}, {"body": {"content-type": ""}, "by": {"content-type": ""}}
            )
        ],
    ]

    for size in (1, 7, 500, len(data)):
        messages = WireReader(read_requests)
        found = [message for i in range(0, len(data), size) for message in messages.feed(data[i : i + size])]
        assert [requests for requests, _ in found] == expected
        assert b"".join(whole for _, whole in found) == data


def test_an_answer_is_written_as_torchserves_own_worker_does() -> None:
    context = Context("upper", "", {"model": {}}, 1, None, "0.12.0")
    context.request_ids, context.request_processor = {0: "id-1"}, [RequestProcessor({})]
    context.set_response_status(422, "Unprocessable Entity", 0)
    context.set_response_header(0, "ts_stream_next", "false")
    context.set_response_content_type(0, "text/plain")
    theirs = create_predict_response([b"body"], context.request_ids, "", 200, context=context)

    headers = {"ts_stream_next": "false", "content-type": "text/plain"}
    ours = write_responses([WireResponse("id-1", 422, "Unprocessable Entity", "text/plain", headers, b"body")])

    assert ours == bytes(theirs)
    answers, end = read_response_heads(bytearray(ours))
    assert (answers.code, answers.more, end) == (200, [("id-1", False)], len(ours))


# What runs in the process that computes.

Serve = Callable[[str], FrontEnd]


@pytest.fixture
def serve(project: Path) -> Iterator[Serve]:
    """Serves a file of the project at the other end of a socket."""
    ends: list[Callable[[], None]] = []

    def of(file: str) -> FrontEnd:
        (project / "build.json").write_text(json.dumps({"file": file, "name": "flow"}))
        service = load(project, None)
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=AsynchronousLoop(service, theirs).run)
        thread.start()
        front = FrontEnd(ours)
        ends.extend([front.close, thread.join, service.close])
        return front

    yield of
    for end in ends:
        end()


SLOW = """
    def slow(text: Text) -> Text:
        if text.text.startswith("gate "): wait_at(text.text[5:])
        if text.text == "long": time.sleep(5)
        return Text(text.text.upper())
"""


def test_every_request_is_answered_when_it_is_ready(serve: Serve, write: Write, tmp_path: Path) -> None:
    write("answer: {function: slow}", SLOW)
    front = serve("workflows/flow.yaml")
    front.ask("id-1", f"gate {tmp_path / 'gate'}".encode())
    front.ask("id-2", b"fast")

    assert front.answer("id-2").json == {"text": "FAST"}
    assert "id-1" not in front._parts
    (tmp_path / "gate").touch()
    assert front.answer("id-1").json["text"].startswith("GATE ")


def test_over_rest_an_answer_is_a_chunk_and_a_failure_is_whole(serve: Serve) -> None:
    """A status of 400 or more closes the connection as soon as its head is out: chunks would be lost."""
    front = serve("handlers/upper.yaml")
    front.ask("id-1", b"a")
    front.ask("id-2", b"bad")

    good, bad = front.answer("id-1"), front.answer("id-2")
    assert (good.status, good.next, good.json) == (200, "true", {"text": "A"})
    assert (bad.status, bad.next, bad.json["message"]) == (422, None, "That text is bad.")
    assert bad.json["request_id"] == "id-2"


def test_over_grpc_an_answer_is_one_message(serve: Serve) -> None:
    """A second one would end the worker, where the call is Predictions."""
    front = serve("handlers/upper.yaml")
    front.ask("id-1", b"a", {})
    front.ask("id-2", b"bad", {})
    front.ask("id-3", headers={"describe": "True"})

    good, bad, described = front.part("id-1"), front.part("id-2"), front.part("id-3")
    assert [one.next for one in (good, bad, described)] == ["false"] * 3
    assert (good.json, bad.json["code"], described.json["name"]) == ({"text": "A"}, 422, "flow")


def test_a_description_over_rest_is_one_message_too(serve: Serve) -> None:
    """TorchServe wraps it into an answer of its own."""
    front = serve("handlers/upper.yaml")
    front.ask("id-1", headers={"Host": "localhost", "describe": "True"})

    part = front.part("id-1")
    assert (part.next, part.json["name"]) == ("false", "flow")


@pytest.mark.parametrize("over", [REST, {}])
def test_a_request_may_be_cancelled_by_its_key(serve: Serve, write: Write, over: dict[str, str]) -> None:
    """In a header over REST, in the client's own case; in an entry of the input over gRPC."""
    write("answer: {function: slow}", SLOW)
    front = serve("workflows/flow.yaml")
    if over:
        front.ask("id-1", b"long", {**over, "X-Cancel-Key": "mine"})
        front.ask("id-2", b"", {**over, "X-Cancel": "mine"})
    else:
        front.ask("id-1", b"long", {}, **{"x-cancel-key": b"mine"})
        front.ask("id-2", b"", {}, **{"x-cancel": b"mine"})

    assert front.answer("id-2").json == {"cancelled": True}
    cancelled = front.answer("id-1")
    assert (cancelled.status, cancelled.json["type"]) == (499, "Cancelled")
    front.ask("id-3", b"", {**REST, "x-cancel": "mine"})
    assert front.answer("id-3").json == {"cancelled": False}


def test_a_client_may_wait_for_less_than_the_workflow_would(serve: Serve, write: Write) -> None:
    write("answer: {function: slow}", SLOW)
    front = serve("workflows/flow.yaml")
    front.ask("id-1", b"long", {**REST, "X-Timeout-Ms": "100"})
    front.ask("id-2", b"a", {**REST, "x-timeout-ms": "soon"})

    assert front.answer("id-1").status == 408
    assert front.answer("id-2").status == 400


def test_one_request_too_many_is_told_when_to_come_again(serve: Serve, write: Write, tmp_path: Path) -> None:
    write("answer: {function: slow}", SLOW, more="serve: {max_inside: 2}\n")
    front = serve("workflows/flow.yaml")
    for i in range(3):
        front.ask(f"id-{i}", f"gate {tmp_path / 'gate'}".encode())

    refused = front.answer("id-2")
    assert (refused.status, refused.json["type"], refused.headers["Retry-After"]) == (503, "Overloaded", "1")
    (tmp_path / "gate").touch()
    assert [front.answer(f"id-{i}").status for i in range(2)] == [200, 200]


TELL = """
    from collections.abc import Iterator

    def tell(text: Text) -> Iterator[KIND]:
        for word in text.text.split():
            if word == "bad": raise InputError("That word is bad.", 422)
            if word == "slow": time.sleep(0.5)
            if word.startswith("gate:"): wait_at(word[5:])
            yield CHUNK
"""


@pytest.fixture
def tell(write: Write) -> Callable[..., Path]:
    def of(kind: str = "Text", chunk: str = "Text(word + ' ')") -> Path:
        return write("answer: {function: tell}", TELL.replace("KIND", kind).replace("CHUNK", chunk))

    return of


def test_chunks_of_text_leave_one_by_one_as_they_are(serve: Serve, tell: Callable[..., Path], tmp_path: Path) -> None:
    tell()
    front = serve("workflows/flow.yaml")
    gate = tmp_path / "gate"
    front.ask("id-1", f"one two gate:{gate}".encode())

    first, second = front.part("id-1"), front.part("id-1")
    assert "id-1" not in front._parts or not front._parts["id-1"], "the third is not ready"
    gate.touch()
    third, end = front.part("id-1"), front.part("id-1")
    assert [(one.status, one.next, one.body) for one in (first, second, third, end)] == [
        (200, "true", b"one "),
        (200, "true", b"two "),
        (200, "true", f"gate:{gate} ".encode()),
        (200, "false", b""),
    ]
    assert first.headers["content-type"] == "text/plain; charset=utf-8"


def test_a_chunk_is_taken_as_soon_as_it_is_written(serve: Serve, tell: Callable[..., Path]) -> None:
    """Else the node would wait for ever after the first few: TorchServe does not say what its client has read."""
    tell()
    front = serve("workflows/flow.yaml")
    words = [f"w{i}" for i in range(10 * MAX_UNTAKEN)]
    front.ask("id-1", " ".join(words).encode())

    assert [front.part("id-1").body.decode() for _ in words] == [f"{word} " for word in words]
    assert front.part("id-1").next == "false"


def test_other_chunks_are_lines_of_json(serve: Serve, tell: Callable[..., Path]) -> None:
    tell("list[str]", "[word]")
    front = serve("workflows/flow.yaml")
    front.ask("id-1", b"one two")

    parts = [front.part("id-1") for _ in range(3)]
    assert [one.body for one in parts] == [b'["one"]\n', b'["two"]\n', b""]
    assert parts[0].headers["content-type"] == "application/x-ndjson"


def test_a_failure_in_the_middle_is_the_last_chunk(serve: Serve, tell: Callable[..., Path]) -> None:
    tell()
    front = serve("workflows/flow.yaml")
    front.ask("id-1", b"one bad")
    front.ask("id-2", b"bad")

    assert front.part("id-1").body == b"one "
    last = front.part("id-1")
    assert (last.next, last.json["code"], last.json["message"]) == ("false", 422, "That word is bad.")
    assert front.answer("id-2").status == 422, "where nothing is out yet, the status can say so"


def test_an_answer_of_no_chunks_is_empty(serve: Serve, tell: Callable[..., Path]) -> None:
    tell()
    front = serve("workflows/flow.yaml")
    front.ask("id-1", b" ")

    assert (front.answer("id-1").status, front._parts) == (200, {"id-1": []})


def test_over_grpc_chunks_must_be_asked_for(serve: Serve, tell: Callable[..., Path]) -> None:
    """TorchServe does not tell which call it is, and a second chunk to Predictions would end the worker."""
    tell()
    front = serve("workflows/flow.yaml")
    front.ask("id-1", b"one two", {})
    front.ask("id-2", b"one two", {}, **{"x-pieces": b"1"})

    whole = front.part("id-1")
    assert (whole.next, whole.body) == ("false", b"one two ")
    assert [front.part("id-2").body for _ in range(3)] == [b"one ", b"two ", b""]


def test_a_stream_may_be_cancelled_in_the_middle(serve: Serve, tell: Callable[..., Path]) -> None:
    tell()
    front = serve("workflows/flow.yaml")
    front.ask("id-1", b"one " + b"slow " * 100, {**REST, "x-cancel-key": "mine"})
    assert front.part("id-1").body == b"one "
    front.ask("id-2", b"", {**REST, "x-cancel": "mine"})

    assert front.answer("id-2").json == {"cancelled": True}
    parts = [front.part("id-1")]
    while parts[-1].next == "true":
        parts.append(front.part("id-1"))
    assert len(parts) < 50
    assert parts[-1].json["type"] == "Cancelled"


def test_what_a_client_asks_does_not_reach_the_workflow_as_a_parameter() -> None:
    row, headers = {"body": b"a", "by": b"me", "X-Priority": b"bulk"}, {"x-timeout-ms": "1500"}
    request = read_request(WireRequest("id-1", row, headers))
    options = read_options(request.options)

    assert request.parts == [Part("body", b"a"), Part("by", b"me")]
    assert (options.priority, options.timeout_s) == ("bulk", 1.5)


def test_a_cancel_key_belongs_to_its_token() -> None:
    """Over REST the front door's header, over gRPC its entry, which comes last and so wins."""
    rest, grpc = (
        read_request(WireRequest("id", {"body": b"a", **row}, headers))
        for row, headers in (
            ({}, {"x-cancel-key": "mine", "x-door-token": "alice"}),
            ({"x-cancel": b"mine", "x-door-token": b"bob"}, {}),
        )
    )

    assert (rest.options["x-cancel-key"], grpc.options["x-cancel"]) == ("alice mine", "bob mine")
    assert {part.name for part in grpc.parts or ()} <= {"body"}


# The whole worker: the guard, and the process that computes.


@dataclass
class Worker:
    front: FrontEnd
    process: subprocess.Popen[str]

    def computing(self) -> int:
        """The pid that is shown to TorchServe; it waits for a new one."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("[PID]"):
                return int(line.removeprefix("[PID]"))
        raise AssertionError("the worker has ended")


WORKER = """
import logging, socket, sys
from pathlib import Path
from torchserve_dag.runtime.worker.torchserve.asynchronous import _guard
logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
_guard(Path(sys.argv[1]), None, 60).run(socket.socket(fileno=int(sys.argv[2])))
"""
WITHOUT_PIDFD = """
import ctypes, os, struct
PIDFD_OPEN, ALLOW, REFUSE = 434, 0x7FFF0000, 0x00050000 | 1
filters = [(0x20, 0, 0, 0), (0x15, 0, 1, PIDFD_OPEN), (0x06, 0, 0, REFUSE), (0x06, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in filters))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(filters), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program) == 0
try:
    os.pidfd_open(os.getpid())
    raise SystemExit("pidfd_open is not refused")
except PermissionError:
    pass
"""
"""Has the kernel refuse pidfd_open (a seccomp filter), as container runtimes do that do not know it."""


@pytest.fixture
def worker(request: pytest.FixtureRequest, project: Path, write: Write) -> Iterator[Worker]:
    """A worker as it is after TorchServe has connected and had the model loaded."""
    write("answer: {function: slow}", SLOW, more="serve: {timeout_s: 6}\n")
    (project / "build.json").write_text(json.dumps({"file": "workflows/flow.yaml"}))
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-c", getattr(request, "param", "") + WORKER, str(project), str(theirs.fileno())],
        pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    theirs.close()
    front = FrontEnd(ours)
    yield Worker(front, process)
    front.close()
    process.kill()
    process.communicate()


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def test_when_the_process_that_computes_is_killed_its_requests_are_answered_and_it_is_replaced(worker: Worker) -> None:
    front, pid = worker.front, worker.computing()
    front.ask("id-1", b"long")
    front.ask("id-2", b"long", {})
    front.settle()
    os.kill(pid, signal.SIGKILL)

    died, over_grpc = front.answer("id-1"), front.part("id-2")
    assert (died.status, died.json["type"], over_grpc.json["code"]) == (507, "WorkerDied", 507)
    front.ask("id-3", b"a")
    assert front.answer("id-3").json == {"text": "A"}
    assert worker.computing() != pid


def test_when_the_guard_is_killed_its_requests_are_answered_and_nothing_is_left(worker: Worker, project: Path) -> None:
    """TorchServe finds its connection closed, and starts another worker."""
    front, pid = worker.front, worker.computing()
    front.ask("id-1", b"long")
    front.settle()
    worker.process.kill()

    assert front.answer("id-1").status == 507
    wait_for(lambda: ended(pid))
    assert [path.name for path in project.rglob("*.log")] == []


@pytest.mark.parametrize("worker", [WITHOUT_PIDFD], indirect=True)
def test_a_worker_serves_where_the_kernel_refuses_pidfds(worker: Worker) -> None:
    pid = worker.computing()
    worker.front.ask("id-1", b"a")
    assert worker.front.answer("id-1").json == {"text": "A"}
    os.kill(pid, signal.SIGKILL)

    assert worker.computing() != pid
    worker.front.ask("id-2", b"b")
    assert worker.front.answer("id-2").json == {"text": "B"}


def test_when_torchserve_ends_nothing_is_left(worker: Worker) -> None:
    pid = worker.computing()
    worker.front.close()

    assert worker.process.wait(WAIT_S) == 0
    wait_for(lambda: ended(pid))


def test_a_model_that_cannot_be_loaded_again_ends_the_worker(worker: Worker, project: Path) -> None:
    """So that TorchServe shows it as not ready; and not before its requests are answered."""
    pid = worker.computing()
    worker.front.ask("id-1", b"long")
    worker.front.settle()
    (project / "build.json").write_text("{}")
    os.kill(pid, signal.SIGKILL)

    assert worker.front.answer("id-1").status == 507
    assert worker.process.wait(WAIT_S) == 1


def test_a_large_body_does_not_hold_up_what_others_are_answered(worker: Worker) -> None:
    """Megabytes in both directions at once, through sockets that hold less."""
    front = worker.front
    worker.computing()
    body = b"x" * 3_000_000
    sending = threading.Thread(target=lambda: [front.ask(f"id-{i}", body) for i in range(8)])
    sending.start()

    assert [len(front.answer(f"id-{i}").json["text"]) for i in range(8)] == [len(body)] * 8
    sending.join()


def test_a_worker_that_hangs_is_replaced_and_loses_nothing(worker: Worker, project: Path, write: Write) -> None:
    functions = SLOW.replace("time.sleep(5)", "time.sleep(3600)")
    write("answer: {function: slow}", functions, more="serve: {timeout_s: 2}\n")
    first = worker.computing()
    os.kill(first, signal.SIGKILL)  # the next one reads the file again
    second = worker.computing()
    worker.front.ask("id-1", b"long")
    assert worker.front.answer("id-1").status == 504

    replaced: list[int] = []
    watching = threading.Thread(target=lambda: replaced.append(worker.computing()))
    watching.start()
    count = 0
    while watching.is_alive():
        worker.front.ask(f"more-{count}", b"a")
        assert worker.front.answer(f"more-{count}").status == 200
        count += 1
        time.sleep(0.05)
    assert replaced
    assert replaced[0] not in {first, second}


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_loaded_worker_says_so_as_torchserve_expects_it() -> None:
    assert read_response_heads(bytearray(LOADED))[0].more == []
