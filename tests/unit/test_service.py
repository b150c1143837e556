"""A worker answers TorchServe's rows: bodies, statuses and content types, request by request."""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
import sys
import threading
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ts.context import Context, RequestProcessor
from ts.protocol.otf_message_handler import create_predict_response, retrieve_msg

from tests.unit.conftest import Write
from tests.unit.front_end import WAIT_S, FrontEnd
from torchserve_dag.archives.build import build
from torchserve_dag.runtime.engine.streaming import MAX_UNTAKEN
from torchserve_dag.runtime.graph.torchserve.segment import pack, unpack
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.worker.protocol import Load, Service, ServiceRequest, ServiceResponse
from torchserve_dag.runtime.worker.service import WorkflowService, load
from torchserve_dag.runtime.worker.torchserve import batched, segments
from torchserve_dag.runtime.worker.torchserve.batched import BatchedLoop
from torchserve_dag.runtime.worker.torchserve.segments import SegmentService

Row = dict[str, Any]
Request = tuple[Row, dict[str, Any]]
Make = Callable[..., BatchedLoop]


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def context(folder: Path, *headers: dict[str, Any]) -> Context:
    """As TorchServe's own ts/service.py makes it for a batch."""
    made = Context("upper", str(folder), {"model": {}}, 1, None, "0.12.0")
    made.request_ids = {i: f"id-{i}" for i in range(len(headers))}
    made.request_processor = [RequestProcessor(one) for one in headers]
    return made


@pytest.fixture
def make(project: Path) -> Iterator[Make]:
    made: list[BatchedLoop] = []

    def of(file: str, load: Load = load, **build: Any) -> BatchedLoop:
        (project / "build.json").write_text(json.dumps({"file": file, "kind": "handler", **build}))
        made.append(BatchedLoop(load(project, None), controls=load is not segments.load))
        return made[-1]

    yield of
    for loop in made:
        loop.close()


def answers(
    loop: BatchedLoop, folder: Path, *rows: Row, headers: list[dict[str, Any]] | None = None
) -> list[tuple[int, str | None, Any]]:
    """Each request's status, content type and body; the bodies have gone through TorchServe's own encoder."""
    ctx = context(folder, *(headers or [{} for _ in rows]))
    found = loop.handle(list(rows), ctx)
    create_predict_response(found, ctx.request_ids, "Prediction success", 200, context=ctx)
    return [
        (ctx.get_response_status(i)[0], ctx.get_response_content_type(i), json.loads(body))
        for i, body in enumerate(found)
    ]


def test_each_request_of_a_batch_has_its_own_status(make: Make, project: Path) -> None:
    found = answers(
        make("handlers/upper.yaml"),
        project,
        {"body": bytearray(b"a")},
        {"body": b"bad"},
        {"body": b""},
        {"body": b"poison"},
        {"body": b"\xff"},
        {"body": b"b"},
    )

    assert [status for status, _, _ in found] == [200, 422, 400, 500, 400, 200]
    assert {kind for _, kind, _ in found} == {"application/json"}
    assert found[0][2] == {"text": "A"}
    assert found[1][2] == {
        "code": 422,
        "type": "InputError",
        "message": "That text is bad.",
        "node": "upper",
        "request_id": "id-1",
    }
    assert found[5][2] == {"text": "B"}


def test_a_body_may_come_as_body_or_as_data_or_under_one_name_of_the_clients_own(make: Make, project: Path) -> None:
    """Raw over REST, as a form's part, or over gRPC under any key."""
    found = answers(make("handlers/upper.yaml"), project, {"body": b"a"}, {"data": b"b"}, {"my_input": b"c"})

    assert [body for _, _, body in found] == [{"text": "A"}, {"text": "B"}, {"text": "C"}]


@pytest.mark.parametrize(
    ("row", "says"), [({}, "is empty"), ({"one": b"a", "two": b"b"}, "Which of one, two is the message?")]
)
def test_a_request_without_a_body_is_refused(make: Make, project: Path, row: Row, says: str) -> None:
    ((status, _, body),) = answers(make("handlers/upper.yaml"), project, row)

    assert status == 400
    assert says in body["message"]


@pytest.mark.parametrize(
    ("row", "headers", "status", "body"),
    [
        ({"body": b'{"text": "a"}'}, {"body": {"content-type": "application/json"}}, 200, {"text": "A"}),
        ({"body": b'{"text": "a"}'}, {"body": {"content-type": "text/plain"}}, 200, {"text": '{"TEXT": "A"}'}),
        ({"data": b'{"text": "a"}'}, {"data": {"content-type": "application/json"}}, 200, {"text": "A"}),
        # A form's own type is not its part's; TorchServe gives both.
        ({"data": b"a"}, {"Content-Type": "multipart/form-data", "data": {"content-type": "text/plain"}}, 200, {"text": "A"}),
        ({"data": b"a"}, {"Content-Type": "multipart/form-data", "data": {"content-type": ""}}, 200, {"text": "A"}),
        # A client may send a header that is called as the body is.
        ({"body": b"a"}, {"body": "a header"}, 200, {"text": "A"}),
        ({"body": b"a"}, {"body": {"content-type": "image/jpeg"}}, 415, None),
    ],
)  # fmt: skip
def test_the_content_type_of_the_part_decides(
    make: Make, project: Path, row: Row, headers: dict[str, Any], status: int, body: Any
) -> None:
    ((found_status, _, found),) = answers(make("handlers/upper.yaml"), project, row, headers=[headers])

    assert found_status == status
    assert body is None or found == body


def test_json_that_torchserve_has_decoded_already_is_read_too(make: Make, project: Path) -> None:
    """`decode_input_request` is on where nobody turned it off."""
    headers = [{"body": {"content-type": "application/json"}}]

    assert answers(make("handlers/upper.yaml"), project, {"body": {"text": "a"}}, headers=headers)[0][2] == {
        "text": "A"
    }


SIGNED = """
    upper: {handler: upper}
    answer: {function: sign, inputs: {text: upper, by: parameters.by}}
"""
SIGN = """
    def sign(text: Text, by: str | None) -> Text: return Text(f"{text.text} ({by})")
"""


def test_what_comes_beside_the_body_is_a_parameter(make: Make, project: Path, write: Write) -> None:
    write(SIGNED, SIGN)

    found = answers(
        make("workflows/flow.yaml"),
        project,
        {"by": b"me", "body": b"a"},
        {"by": "\u00fc", "body": b"b"},
        {"body": b"c"},
    )

    assert [body["text"] for _, _, body in found] == ["A (me)", "B (\u00fc)", "C (None)"]


ODD = """
    def odd(text: Text) -> {kind}:
        if text.text == "status": raise InputError("Odd.", 499)
        return {value}
"""


def test_a_status_that_has_no_name_is_passed_on(make: Make, project: Path, write: Write) -> None:
    write("answer: {function: odd}", ODD.replace("{kind}", "Text").replace("{value}", "text"))

    found = answers(make("workflows/flow.yaml"), project, {"body": b"status"}, {"body": b"a"})

    assert [status for status, _, _ in found] == [499, 200]


def test_an_answer_that_is_too_large_for_torchserve_is_refused_here(make: Make, project: Path, write: Write) -> None:
    """TorchServe would end the worker with all its requests."""
    write("answer: {function: odd}", ODD.replace("{kind}", "Text").replace("{value}", "Text('x' * int(text.text))"))

    found = answers(make("workflows/flow.yaml"), project, {"body": b"6553600"}, {"body": b"6000000"})

    assert [status for status, _, _ in found] == [500, 200]
    assert (found[0][2]["type"], found[0][2]["request_id"]) == ("AnswerTooLarge", "id-0")
    assert "the limit is 6,553,500" in found[0][2]["message"]


def test_an_answer_that_cannot_be_written_touches_no_other(make: Make, project: Path, write: Write) -> None:
    write("answer: {function: odd}", ODD.replace("{kind}", "float").replace("{value}", "float(text.text)"))

    found = answers(make("workflows/flow.yaml"), project, {"body": b"nan"}, {"body": b"1.5"})

    assert [(status, body) for status, _, body in found][1] == (200, 1.5)
    assert (found[0][0], found[0][2]["message"]) == (
        500,
        "The answer cannot be written: answer is nan, which JSON does not have.",
    )


def test_bytes_have_their_own_content_type(make: Make, project: Path, write: Write) -> None:
    write("answer: {function: odd}", ODD.replace("{kind}", "bytes").replace("{value}", "b'12'"))

    assert answers(make("workflows/flow.yaml"), project, {"body": b"a"}) == [(200, "application/octet-stream", 12)]


# The protocol between a host and an archive, without TorchServe.

TALK = """
    from collections.abc import Iterator

    def talk(text: Text) -> Iterator[Text]:
        for word in text.text.split():
            if word == "bad": raise InputError("That word is bad.", 422)
            if word == "slow": time.sleep(5)
            yield Text("" if word == "empty" else word)
"""


@pytest.fixture
def talking(project: Path, write: Write) -> Iterator[Service]:
    write("answer: {function: talk}", TALK)
    (project / "build.json").write_text(json.dumps({"file": "workflows/flow.yaml", "name": "flow"}))
    service: Service = load(project, None)
    yield service
    service.close()


def test_chunks_arrive_one_by_one_and_the_response_is_what_is_left(talking: Service) -> None:
    chunks: list[tuple[bytes, str]] = []

    def receive(body: bytes, content_type: str, taken: Callable[[], None]) -> None:
        chunks.append((body, content_type))
        taken()

    pending = talking.submit(ServiceRequest("id-1", b"one two"), receive)

    assert talking.streams
    assert pending.result(WAIT_S) == ServiceResponse(b"")
    assert chunks == [(b"one", "text/plain; charset=utf-8"), (b"two", "text/plain; charset=utf-8")]
    assert talking.submit(ServiceRequest("id-2", b"one two")).result(WAIT_S).body == b"onetwo", "without a callback"


def test_a_host_that_takes_no_chunk_is_sent_a_bounded_number_and_the_rest_when_it_takes_them(talking: Service) -> None:
    came: list[tuple[bytes, str, Callable[[], None]]] = []
    words = [f"w{i}" for i in range(100)]
    pending = talking.submit(ServiceRequest("id-1", " ".join(words).encode()), lambda *chunk: came.append(chunk))
    until(lambda: len(came) == MAX_UNTAKEN)
    assert talking.submit(ServiceRequest("id-2", b"one two")).result(WAIT_S).body == b"onetwo"
    assert len(came) == MAX_UNTAKEN

    for i in range(100):
        until(lambda i=i: len(came) > i)
        came[i][2]()
    assert pending.result(WAIT_S) == ServiceResponse(b"")
    assert [body.decode() for body, *_ in came] == words


def test_chunks_without_bytes_need_no_taking(talking: Service) -> None:
    talks = talking.submit(ServiceRequest("id-1", b"empty " * 100 + b"one"), lambda *_: None)

    assert talks.result(WAIT_S) == ServiceResponse(b"")


def test_an_answer_that_fails_after_chunks_ends_with_the_failure(talking: Service) -> None:
    chunks: list[bytes] = []
    pending = talking.submit(ServiceRequest("id-1", b"one bad"), lambda body, *_: chunks.append(body))
    response = pending.result(WAIT_S)

    assert chunks == [b"one"]
    assert (response.status, json.loads(response.body)["code"]) == (422, 422)


def test_a_pending_response_may_be_cancelled_by_its_host_or_by_the_clients_key(talking: Service) -> None:
    by_host = talking.submit(ServiceRequest("id-1", b"slow"))
    by_key = talking.submit(ServiceRequest("id-2", b"slow", options={"x-cancel-key": "mine"}))
    done: list[ServiceResponse] = []
    by_host.add_done_callback(done.append)
    by_host.cancel()

    assert by_host.result(WAIT_S).status == 499
    assert [json.loads(response.body)["request_id"] for response in done] == ["id-1"]
    assert (talking.cancel("mine"), talking.cancel("nobody's")) == (True, False)
    assert by_key.result(WAIT_S).status == 499


@pytest.mark.parametrize(
    ("waited_s", "asked", "status", "message"),
    [
        (60, {}, 504, "No answer within 30 s."),
        (3, {"x-timeout-ms": "2000"}, 408, "No answer within 2 s."),
        (3, {"x-timeout-ms": "200000"}, 200, None),
        (3, {}, 200, None),
        (-3, {"x-timeout-ms": "20000"}, 200, None),
    ],
)
def test_a_time_limit_counts_from_the_arrival_at_the_front_door(
    talking: Service, waited_s: float, asked: dict[str, str], status: int, message: str | None
) -> None:
    """TorchServe's queue may hold a request for long: work that nobody waits for is not begun."""
    arrived = str(round((time.time() - waited_s) * 1000))
    response = talking.submit(ServiceRequest("id-1", b"one", options={"x-arrived-ms": arrived, **asked})).result(WAIT_S)
    begun = talking.metrics()["request", "torchserve_dag_node_items_total", ()]

    assert (response.status, begun) == (status, 1 if status == 200 else 0)
    assert message is None or json.loads(response.body)["message"] == message


def test_a_request_that_is_refused_has_its_response_at_once(talking: Service) -> None:
    done: list[ServiceResponse] = []
    pending = talking.submit(ServiceRequest("id-1", b"a", options={"x-timeout-ms": "soon"}))
    pending.add_done_callback(done.append)
    pending.cancel()

    assert [response.status for response in done] == [400]
    assert pending.result(0) == done[0]


def test_what_crosses_the_line_is_plain(talking: Service) -> None:
    """The two sides may be of different versions of this package."""
    talking.submit(ServiceRequest("id-1", b"a")).result(WAIT_S)
    metrics = talking.metrics()

    assert metrics["request", "torchserve_dag_node_items_total", ()] == 1
    assert metrics["request", "torchserve_dag_node_batch_size_bucket", (("le", "1.0"),)] == 1
    assert {type(part) for series in metrics for part in series} == {str, tuple}
    assert talking.gauges() == {}
    assert talking.describe() == {"file": "workflows/flow.yaml", "name": "flow"}
    assert (talking.name, talking.version, talking.hangs()) == ("flow", "1.0", False)
    assert talking.timeout_s == 30


# The function that TorchServe calls.


@pytest.fixture
def entry(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(batched, "_loops", {})
    (project / "build.json").write_text(json.dumps({"file": "handlers/upper.yaml", "name": "upper", "version": "1.0"}))
    yield project
    for loop in batched._loops.values():
        loop.close()


def test_torchserve_loads_with_no_rows_and_then_asks(entry: Path) -> None:
    assert batched.handle(None, context(entry)) == []
    loaded = batched._loops[entry]
    assert isinstance(loaded._service, WorkflowService)

    assert batched.handle([{"body": b"a"}], context(entry, {})) == [b'{"text": "A"}']
    assert list(batched._loops.values()) == [loaded]


def test_a_request_to_describe_is_answered_with_what_the_archive_says(entry: Path) -> None:
    (body,) = batched.handle([{}], context(entry, {"describe": "True"}))

    assert json.loads(body) == {"file": "handlers/upper.yaml", "name": "upper", "version": "1.0"}


def test_a_client_that_asks_to_describe_does_not_touch_its_neighbours(entry: Path) -> None:
    """TorchServe hands every header of every client on."""
    mine, described = batched.handle([{"body": b"a"}, {}], context(entry, {}, {"describe": "True"}))

    assert mine == b'{"text": "A"}'
    assert json.loads(described)["name"] == "upper"


def test_a_whole_answer_ends_a_stream_over_grpc_only(entry: Path) -> None:
    """Or TorchServe ends the worker; over REST it would be a header that nobody asked for."""
    found = context(entry, {}, {"explain": "False"})
    batched.handle([{"body": b"a"}, {"body": b"b"}], found)

    assert found.get_response_headers(0)["ts_stream_next"] == "false"
    assert "ts_stream_next" not in found.get_response_headers(1)


def test_an_archive_of_a_segment_is_served_as_one(entry: Path, write: Write) -> None:
    write(SIGNED, SIGN)
    (entry / "build.json").write_text(json.dumps({"file": "workflows/flow.yaml", "segment": "upper"}))
    batched.handle(None, context(entry))

    assert isinstance(batched._loops[entry]._service, SegmentService)
    assert batched.handle([{"body": b"a", "by": b"me"}], context(entry, {})) == [b'{"text": "A (me)"}']


def test_an_archive_of_ours_may_be_a_node_of_another(project: Path, tmp_path: Path) -> None:
    """A workflow in TorchServe's own form, of two of our archives, as an archive."""
    build(Project(project), ["upper", "words"])
    (project / "workflows" / "native.yaml").write_text(
        "models: {upper: {url: upper-1.0.mar}, words: {url: words-1.0.mar}}\ndag: {upper: [words]}\n"
    )
    (built,) = build(Project(project), ["native"]).built
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(built.path) as archive:
        archive.extractall(folder)
    batched.handle(None, context(folder))

    found = context(folder, {}, {})
    good, bad = batched.handle([{"body": b"a bc"}, {"body": b"bad"}], found)
    assert b"A" in good
    assert (found.get_response_status(1)[0], json.loads(bad)["message"]) == (422, "That text is bad.")


# The segments of a `.war`.

CHAIN = """
    first: {handler: upper}
    second: {handler: upper, input: first}
    answer: {function: sign, inputs: {text: second, by: parameters.by}}
"""


@pytest.fixture
def war(make: Make, write: Write) -> Callable[..., list[Any]]:
    """Sends requests through a chain of two segments, as TorchServe's engine would."""
    write(CHAIN, SIGN)
    first, second = (make("workflows/flow.yaml", segments.load, segment=name) for name in ("first", "second"))

    def send(folder: Path, *requests: Request) -> list[Any]:
        rows, headers = [row for row, _ in requests], [header for _, header in requests]
        sealed = first.handle(rows, context(folder, *headers))
        found = second.handle([{"body": bytearray(one)} for one in sealed], context(folder, *({} for _ in rows)))
        return [json.loads(body) for body in found]

    return send


def test_segments_pass_content_type_and_parameters_on(war: Callable[..., list[Any]], project: Path) -> None:
    """TorchServe itself gives them to the first node only."""
    found = war(
        project,
        ({"body": b'{"text": "a"}', "by": b"me"}, {"body": {"content-type": "application/json"}}),
        ({"by": b"you", "data": b"b"}, {}),
    )

    assert found == [{"text": "A (me)"}, {"text": "B (you)"}]


def test_a_war_reads_bodies_as_an_archive_does(war: Callable[..., list[Any]], project: Path) -> None:
    packed, latin = {"Content-Encoding": "gzip"}, "text/plain; charset=latin-1"
    found = war(
        project,
        ({"body": gzip.compress(b"a", mtime=0)}, packed),
        ({"body": b"a"}, packed),
        ({"one": b"a", "two": b"b"}, {}),
        ({"body": b"\xfc"}, {"Content-Type": latin, "body": {"content-type": "text/plain"}}),
    )

    assert [body.get("code", body.get("text")) for body in found] == ["A (None)", 400, 400, "Ü (None)"]


def test_a_failure_reaches_the_client_and_touches_no_other(war: Callable[..., list[Any]], project: Path) -> None:
    found = war(
        project, ({"body": b"a"}, {}), ({"body": b"bad"}, {}), ({"body": b""}, {}), ({}, {}), ({"body": b"c"}, {})
    )

    assert [body.get("code", 200) for body in found] == [200, 422, 400, 400, 200]
    assert (found[1]["node"], found[1]["message"]) == ("first", "That text is bad.")


@pytest.mark.parametrize(
    "body", [b"TSDAG1\n", b"TSDAG1\nnot json\n", pack({"request": b"x", "!failure": b"{}"}), pack({"first": b"1"})]
)
def test_a_client_cannot_send_an_envelope_of_its_own(war: Callable[..., list[Any]], project: Path, body: bytes) -> None:
    found = war(project, ({"body": body}, {}), ({"body": b"a"}, {}))

    assert found == [{"text": f"{body.decode().upper()} (None)"}, {"text": "A (None)"}]


def test_an_envelope_that_is_too_large_for_torchserve_is_a_failure(make: Make, project: Path, write: Write) -> None:
    write(CHAIN, SIGN)
    first = make("workflows/flow.yaml", segments.load, segment="first")

    (sealed,) = first.handle([{"body": b"x" * 4_000_000}], context(project, {}))

    assert json.loads(unpack(sealed)["!failure"])["type"] == "AnswerTooLarge"


def test_batches_are_read_from_the_socket_and_answered(make: Make) -> None:
    """As TorchServe's own worker reads and answers them: tests/live has the real one."""
    ours, theirs = socket.socketpair()
    loop = make("handlers/upper.yaml")
    worker = threading.Thread(target=loop.run, args=(theirs,))
    worker.start()
    front = FrontEnd(ours)
    large = b"x" * 700_000  # arrives in several parts
    front.ask_together({"id-1": b"a", "id-2": b"bad", "id-3": large})
    found = {name: front.part(name) for name in ("id-1", "id-2", "id-3")}
    assert {name: part.status for name, part in found.items()} == {"id-1": 200, "id-2": 422, "id-3": 200}
    assert found["id-1"].json == {"text": "A"}
    assert found["id-2"].headers["content-type"] == "application/json"
    assert len(found["id-3"].json["text"]) == len(large)
    assert found["id-1"].next is None, "over REST the header would make a stream of it"
    front.ask("id-4", b"b", {})
    assert front.part("id-4").next == "false", "over gRPC a whole answer without it ends the worker"
    ours.shutdown(socket.SHUT_WR)
    worker.join(WAIT_S)
    assert not worker.is_alive(), "TorchServe has ended the connection"
    front.close()


def test_only_the_workers_own_archive_takes_its_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", worker)
    assert batched._SocketReader.take_over() is None, "no worker of TorchServe's"

    vars(worker)["retrieve_msg"] = retrieve_msg
    reader = batched._SocketReader.take_over()
    assert vars(worker)["retrieve_msg"] is reader
    assert batched._SocketReader.take_over() is None, "an archive that is a node of the worker's"
    with pytest.raises(RuntimeError, match="not loaded"):
        reader(socket.socket())


def test_a_workflow_of_functions_is_loaded_without_torch(project: Path, write: Write) -> None:
    """It takes two seconds to import, and 150 MB."""
    write("answer: {function: same}", "def same(text: Text) -> Text: return text")
    (project / "build.json").write_text(json.dumps({"file": "workflows/flow.yaml", "name": "flow"}))
    program = (
        "import sys; from pathlib import Path\n"
        "from torchserve_dag.runtime.worker.service import load\n"
        "load(Path(sys.argv[1]), None)\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(project)], check=True, timeout=300)
