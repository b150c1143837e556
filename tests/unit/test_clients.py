"""The clients: what they send, what they make of an answer or a failure, and when they try again."""
# ruff: noqa: N802, S106 (grpc's names; tokens of no server)

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from torchserve_dag.clients import (
    AsyncGrpcClient,
    AsyncRestClient,
    ConnectionLost,
    DeadlineExceeded,
    GrpcClient,
    KeyFile,
    ModelNotFound,
    Options,
    Overloaded,
    RequestRefused,
    RestClient,
    ServerFailed,
    ServingError,
    TooLarge,
    Unauthorized,
    UnexpectedAnswer,
    Unreachable,
)
from torchserve_dag.clients.bodies import answer_as, body_of
from torchserve_dag.clients.chunks import FailureFilter, MessageReader
from torchserve_dag.clients.errors import error_from_http, error_of
from torchserve_dag.direct.open_inference import protos as open_inference_protos
from torchserve_dag.runtime import protos
from torchserve_dag.runtime.messages import Box, DetectedObject, Label, Objects, Photo, Text
from torchserve_dag.runtime.protos import inference_pb2, inference_pb2_grpc, management_pb2, management_pb2_grpc

OBJECTS = Objects(4, 3, [DetectedObject("cat", 0.5, Box(0.0, 0.0, 1.0, 1.0))])
FAILURE = {"code": 415, "type": "InputError", "message": "No.", "node": "detect", "request_id": "r1"}
DESCRIBED: dict[str, Any] = {
    "modelVersion": "1.0", "modelUrl": "a.mar", "minWorkers": 2, "maxWorkers": 2, "batchSize": 8, "maxBatchDelay": 1,
    "responseTimeout": 120, "jobQueueStatus": {"pendingRequests": 0},
    "workers": [{"id": "1", "status": "READY", "pid": 7, "gpu": False},
                {"id": "2", "status": "UNLOADING", "pid": 8, "gpu": False}],
}  # fmt: skip


def run(result: Any) -> Any:
    """What a method gives, whichever client's it is."""
    if inspect.isasyncgen(result):

        async def gathered() -> list[Any]:
            return [chunk async for chunk in result]

        return asyncio.run(gathered())
    if inspect.isawaitable(result):

        async def awaited() -> Any:
            return await result

        return asyncio.run(awaited())
    return list(result) if inspect.isgenerator(result) else result


class FakeServer:
    """Answers with each of its replies in turn, the last for ever, and keeps the requests."""

    def __init__(self, *replies: httpx.Response | Exception) -> None:
        self.replies = list(replies)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        return httpx.Response(reply.status_code, content=reply.content, headers=reply.headers)


@pytest.fixture(params=[RestClient, AsyncRestClient])
def rest(request: pytest.FixtureRequest) -> Callable[..., Any]:
    def make(fake: FakeServer, **settings: Any) -> Any:
        return request.param(transport=httpx.MockTransport(fake), **settings)

    return make


def reply(status: int, data: Any = None) -> httpx.Response:
    return httpx.Response(status, content=b"" if data is None else json.dumps(data).encode())


def no_worker() -> httpx.Response:
    return reply(503, {"code": 503, "type": "ServiceUnavailableException", "message": "no worker"})


# What is sent


def test_bytes_and_files_go_as_they_are_with_the_type_that_they_show(tmp_path: Path) -> None:
    photo, words = tmp_path / "photo.data", tmp_path / "words.json"
    photo.write_bytes(b"\xff\xd8\xff\xe0 jpeg")
    words.write_bytes(b"{}")

    assert body_of(photo).content_type == "image/jpeg"
    assert body_of(photo).content == b"\xff\xd8\xff\xe0 jpeg"
    assert body_of(words).content_type == "application/json"
    assert body_of(b"RIFF....WEBP").content_type == "image/webp"
    assert body_of(b"anything").content_type == "application/octet-stream"


def test_messages_are_encoded() -> None:
    assert body_of(Photo(Image.new("RGB", (2, 2)))).content_type == "image/png"
    assert (body_of(Text("grün")).content, body_of(Text("x")).content_type[:10]) == ("grün".encode(), "text/plain")
    assert json.loads(body_of(OBJECTS).content)["objects"][0]["label"] == "cat"
    with pytest.raises(TypeError, match="write Path"):
        body_of("photo.jpg")


def test_a_message_that_json_cannot_hold_is_a_form_with_a_part_for_each_field(
    rest: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "cat.gif").write_bytes(b"GIF8 cat")
    server = FakeServer(reply(200, {}))
    run(
        rest(server).predict(
            "a", {"photo": tmp_path / "cat.gif", "caption": "gr\u00fcn", "top": 3}, parameters={"by": "me"}
        )
    )
    (request,) = server.requests
    boundary = request.headers["content-type"].partition("boundary=")[2].encode()
    parts = [part.strip().partition(b"\r\n\r\n") for part in request.content.split(b"--" + boundary)[1:-1]]

    assert [content for _, _, content in parts] == [b"GIF8 cat", "gr\u00fcn".encode(), b"3", b"me"]
    for (head, _, _), (name, content_type) in zip(
        parts,
        [
            ("photo", b"image/gif"),
            ("caption", b"text/plain; charset=utf-8"),
            ("top", b"application/json"),
            ("parameters.by", None),
        ],
        strict=True,
    ):
        assert f'name="{name}"'.encode() in head
        assert content_type is None or b"Content-Type: " + content_type in head
    with pytest.raises(TypeError, match="cannot have parts itself"):
        body_of({"inner": {"photo": b"GIF8"}, "photo": b"GIF8"})


def test_a_message_alone_is_the_body(rest: Callable[..., Any]) -> None:
    server = FakeServer(reply(200, {}))
    run(rest(server, token="one", management_token="two").predict("a b", b"GIF8 x", "1.0"))
    (request,) = server.requests

    assert str(request.url) == "http://127.0.0.1:8080/predictions/a%20b/1.0"
    assert (request.content, request.headers["content-type"]) == (b"GIF8 x", "image/gif")
    assert request.headers["authorization"] == "Bearer one"


def test_the_front_door_may_repeat_that_a_server_is_healthy_without_a_body(rest: Callable[..., Any]) -> None:
    assert run(rest(FakeServer(reply(200))).ready())
    assert not run(rest(FakeServer(reply(500))).ready())


def test_parameters_make_a_form(rest: Callable[..., Any]) -> None:
    server = FakeServer(reply(200, {}))
    run(rest(server).predict("a", b"GIF8 x", parameters={"top": "3"}))
    content = server.requests[0].content

    assert b'name="body"; filename="body"\r\nContent-Type: image/gif\r\n\r\nGIF8 x' in content
    assert b'name="top"\r\n\r\n3' in content
    with pytest.raises(ValueError, match="body"):
        run(rest(server).predict("a", b"x", parameters={"body": "y"}))


def test_management_has_its_own_port_and_token_even_behind_one_address(rest: Callable[..., Any]) -> None:
    server = FakeServer(reply(200, {}))
    door = "https://door.example"
    run(rest(server, server=door, management=door, token="one", management_token="two").set_default("a", "2"))

    assert server.requests[0].headers["authorization"] == "Bearer two"
    assert (server.requests[0].method, server.requests[0].url.path) == ("PUT", "/models/a/2/set-default")


def test_tokens_are_read_from_the_key_file(tmp_path: Path) -> None:
    file = tmp_path / "key_file.json"
    file.write_text('{"management": {"key": "m"}, "inference": {"key": "i"}, "API": {"key": "a"}}')

    assert KeyFile.read(file) == KeyFile("i", "m")
    assert "'i'" not in repr(KeyFile.read(file))
    file.write_text("")
    with pytest.raises(ValueError, match="holds no tokens"):
        KeyFile.read(file)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8080", "localhost:8080", "http://", "ftp://a", "http://a:x", "http://[::1", "http://a:65536"]
)
@pytest.mark.parametrize("kind", [RestClient, AsyncRestClient])
def test_a_malformed_address_is_refused_at_once(kind: Any, address: str) -> None:
    for addresses in ({"server": address}, {"management": address}):
        with pytest.raises(ValueError, match="is not an address; write http://HOST:PORT"):
            kind(**addresses)


# What is asked beside the message


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OPTIONS = Options(("detect", "classify"), 0.5, "bulk", TRACE, "key")
ASKED = {
    "x-outputs": "detect,classify", "x-timeout-ms": "500", "x-priority": "bulk", "traceparent": TRACE,
    "x-cancel-key": "key",
}  # fmt: skip


@pytest.mark.parametrize("parameters", [None, {"top": "3"}])
def test_options_are_headers(rest: Callable[..., Any], parameters: dict[str, str] | None) -> None:
    server = FakeServer(reply(200, {}))
    for method in ("predict", "stream"):
        run(getattr(rest(server), method)("a", b"GIF8 x", parameters=parameters, options=OPTIONS))

    assert len(server.requests) >= 2
    for request in server.requests:
        assert {name: value for name, value in request.headers.items() if name in ASKED} == ASKED
        assert b"GIF8 x" in request.content


def test_the_server_is_told_how_long_its_client_still_waits(rest: Callable[..., Any]) -> None:
    server = FakeServer(no_worker(), reply(200, {}))
    run(rest(server, timeout=5).predict("a", b"x", options=Options(timeout_s=60)))
    first, second = (int(request.headers["x-timeout-ms"]) for request in server.requests)

    assert 0 < second < first <= 5000
    assert not [name for name in server.requests[0].headers if name.startswith("x-") and name != "x-timeout-ms"]


@dataclass(frozen=True)
class Both:
    detect: Objects
    classify: list[Label]


def test_outputs_are_answered_by_their_names(rest: Callable[..., Any]) -> None:
    both = Both(OBJECTS, [Label("cat", 0.5)])
    client = rest(FakeServer(httpx.Response(200, content=body_of(both).content)))

    def ask(answer: Any) -> Any:
        return run(client.predict("a", b"x", answer=answer, options=OPTIONS))

    assert ask(Both) == both
    assert ask(None) == ask(dict) == ask(dict[str, Any]) == json.loads(ask(bytes))
    for kind in (Objects, Text, Photo, list[Label], str):
        with pytest.raises(
            TypeError, match=r"let `answer` be a dict, or a dataclass with the fields detect, classify, not"
        ):
            ask(kind)


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ({"parameters": {"X-Outputs": "detect"}}, "give it among the options"),
        ({"options": Options(("détecte",))}, "plain ASCII"),
        ({"options": Options(cancel_key="a\nb")}, "plain ASCII"),
        ({"options": Options(timeout_s=0.0)}, "more than 0"),
    ],
)
def test_what_cannot_be_asked_is_refused(rest: Callable[..., Any], named: Any, sentence: str) -> None:
    server = FakeServer(reply(200, {}))
    with pytest.raises(ValueError, match=sentence):
        run(rest(server).predict("a", b"x", **named))

    assert not server.requests


# What is made of an answer


def test_an_answer_becomes_the_message_asked_for(rest: Callable[..., Any]) -> None:
    client = rest(FakeServer(httpx.Response(200, content=body_of(OBJECTS).content)))

    assert run(client.predict("a", b"x", answer=Objects)) == OBJECTS
    assert run(client.predict("a", b"x"))["width"] == 4
    assert run(client.predict("a", b"x", answer=bytes)) == body_of(OBJECTS).content
    with pytest.raises(UnexpectedAnswer, match='unknown key "width"'):
        run(client.predict("a", b"x", answer=Label))


def test_bytes_that_are_no_json_stay_bytes(rest: Callable[..., Any]) -> None:
    client = rest(FakeServer(httpx.Response(200, content=b"\x89PNG")))

    assert run(client.predict("a", b"x")) == b"\x89PNG"
    for kind in (Label, Photo, list[Label]):
        with pytest.raises(UnexpectedAnswer):
            run(client.predict("a", b"x", answer=kind))


@pytest.mark.parametrize("status", [415, 200])  # a .war drops the status
def test_a_failure_carries_its_facts(rest: Callable[..., Any], status: int) -> None:
    with pytest.raises(RequestRefused) as caught:
        run(rest(FakeServer(reply(status, FAILURE))).predict("a", b"x"))

    assert str(caught.value) == "No. (415 InputError, node detect, request r1)"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301 (its own)


@pytest.mark.parametrize(
    ("status", "said", "kind", "shown"),
    [
        (400, "InvalidKeyException", Unauthorized, 401),
        (401, "", Unauthorized, 401),
        (403, "", Unauthorized, 401),
        (403, "InvalidModelVersionException", RequestRefused, 403),
        (404, "ModelVersionNotFoundException", ModelNotFound, 404),
        (500, "ModelNotFoundException", ModelNotFound, 404),
        (404, "ResourceNotFoundException", RequestRefused, 404),
        (413, "", TooLarge, 413),
        (429, "", Overloaded, 429),
        (500, "InternalServerException", ServerFailed, 500),
        (503, "ServiceUnavailableException", Overloaded, 503),
        (503, "InternalServerException", ServerFailed, 503),
        (408, "Timeout", DeadlineExceeded, 504),
        (408, "", RequestRefused, 408),
        (504, "Timeout", DeadlineExceeded, 504),
        (507, "InternalServerException", ServerFailed, 507),
    ],
)
def test_each_failure_has_its_exception(status: int, said: str, kind: Any, shown: int) -> None:
    error = error_of(status, said)

    assert (error.__class__, error.status) == (kind, shown)
    assert error.message


def test_models_are_read_page_by_page(rest: Callable[..., Any]) -> None:
    listed = [
        reply(200, {"models": [{"modelName": "a"}], "nextPageToken": "1"}),
        reply(200, {"models": [{"modelName": "gone"}]}),
    ]
    every = reply(200, [{**DESCRIBED, "modelVersion": version} for version in ("1.10", "1.9")])
    default = reply(200, [{**DESCRIBED, "modelVersion": "1.9"}])
    gone = reply(404, {"code": 404, "type": "ModelNotFoundException", "message": "Model not found: gone"})
    server = FakeServer(*listed, every, default, gone)

    (model,) = run(rest(server).models())

    assert [str(r.url).rpartition(":8081")[2] for r in server.requests] == [
        "/models?limit=100&next_page_token=0", "/models?limit=100&next_page_token=1",
        "/models/a/all", "/models/a", "/models/gone/all",
    ]  # fmt: skip
    assert [(v.version, v.default, v.state) for v in model.versions] == [
        ("1.9", True, "starting"),
        ("1.10", False, "starting"),
    ]


def test_ready_needs_the_least_number_of_workers(rest: Callable[..., Any]) -> None:
    assert run(rest(FakeServer(reply(200, {"status": "Healthy"}))).ready())
    assert not run(rest(FakeServer(reply(500, {"status": "Unhealthy"}))).ready())
    assert not run(rest(FakeServer(reply(200, [DESCRIBED]))).ready("a"))
    assert run(rest(FakeServer(reply(200, [{**DESCRIBED, "minWorkers": 1}]))).ready("a"))
    assert not run(rest(FakeServer(httpx.ConnectError("refused")), retries=0).ready())


# When it is tried again


@pytest.mark.parametrize("failed", [httpx.ConnectError("refused"), no_worker(), reply(429)])
def test_what_cannot_have_been_served_is_sent_again(rest: Callable[..., Any], failed: Any) -> None:
    server = FakeServer(failed, failed, reply(200, {"a": 1}))

    assert run(rest(server).predict("a", b"x")) == {"a": 1}
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("failed", "kind"),
    [
        (httpx.ReadError("reset"), ConnectionLost),
        (httpx.RemoteProtocolError("closed"), ConnectionLost),
        (httpx.ReadTimeout("late"), DeadlineExceeded),
        (reply(503, {"code": 503, "type": "InternalServerException", "message": "Prediction failed"}), ServerFailed),
        (reply(503, {"code": 503, "type": "Busy", "message": "A node is busy."}), Overloaded),
    ],
)
def test_what_may_have_been_served_is_not_sent_again(rest: Callable[..., Any], failed: Any, kind: Any) -> None:
    server = FakeServer(failed)
    for method in ("predict", "stream"):
        with pytest.raises(kind):
            run(getattr(rest(server), method)("a", b"x"))

    assert len([request for request in server.requests if "x-cancel" not in request.headers]) == 2


def test_a_question_is_asked_again_after_a_broken_connection(rest: Callable[..., Any]) -> None:
    server = FakeServer(httpx.ReadError("reset"), reply(200, {"models": []}))

    assert run(rest(server).models()) == []
    assert len(server.requests) == 2


def test_retries_are_bounded_by_number_and_by_deadline(rest: Callable[..., Any]) -> None:
    server = FakeServer(no_worker())
    with pytest.raises(Overloaded):
        run(rest(server, retries=1).predict("a", b"x"))
    assert len(server.requests) == 2

    began = time.monotonic()
    with pytest.raises(Overloaded):
        run(rest(server, retries=50).predict("a", b"x", timeout=0.5))
    assert time.monotonic() - began < 15  # fifty pauses would be minutes


def test_a_stream_gives_chunks_until_one_is_a_failure(rest: Callable[..., Any]) -> None:
    class Chunks(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield from (b"one", json.dumps(FAILURE).encode())

        async def __aiter__(self) -> Any:
            for chunk in self:
                yield chunk

    got: list[bytes] = []
    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Chunks()))

    async def gather() -> None:
        async for chunk in AsyncRestClient(transport=transport).stream("a", b"x"):
            got.append(chunk)  # noqa: PERF401 (what came before the failure counts)

    with pytest.raises(RequestRefused):
        asyncio.run(gather())
    with pytest.raises(RequestRefused):
        got.extend(RestClient(transport=transport).stream("a", b"x"))
    assert got == [b"one", b"one"]


FAILED = json.dumps(FAILURE).encode()


def cut(body: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(body) + 1) for place in places})
    return [body[start:end] for start, end in zip([0, *ends], [*ends, len(body)], strict=True)]


def filtered(chunks: list[bytes]) -> tuple[bytes, ServingError | None]:
    body, passed = FailureFilter(), b""
    try:
        for chunk in chunks:
            for passed_on in body.feed(chunk):
                passed += passed_on
    except ServingError as error:
        return passed, error
    return passed + body.held, None


PLACES = st.lists(st.integers(0, 10_000), max_size=8)


@given(st.text(alphabet='{"code": 5}\n a', max_size=60), PLACES)
def test_what_is_no_failure_passes_however_it_is_cut(text: str, places: list[int]) -> None:
    assert filtered(cut(text.encode(), places)) == (text.encode(), None)


@given(st.text(alphabet='{"code": 5}\n a', max_size=60), PLACES)
def test_a_failure_is_found_however_it_is_merged(text: str, places: list[int]) -> None:
    passed, error = filtered(cut(text.encode() + b"\n" + FAILED + b"\n", places))

    assert isinstance(error, RequestRefused)
    assert passed in {text.encode(), text.encode() + b"\n"}  # the newline before the failure may be out already


def test_nothing_waits_that_cannot_become_a_failure() -> None:
    body = FailureFilter()

    assert list(body.feed(b"one\n")) == [b"one\n"]
    assert list(body.feed(b'{"code": 5}\n')) == [b'{"code": 5}\n']
    assert list(body.feed(b'two\n{"co')) == [b"two\n"]
    assert list(body.feed(b'al": 1')) == [b'{"coal": 1']


@given(st.lists(st.text(max_size=5)), PLACES)
def test_lines_become_messages_however_they_are_cut(names: list[str], places: list[int]) -> None:
    body = b"".join(body_of(Label(name, 1.0)).content + b"\n" for name in names)
    for whole in (body, body.removesuffix(b"\n")):
        reader = MessageReader(Label)
        got = [message for chunk in cut(whole, places) for message in reader.read(chunk)] + reader.end()

        assert got == [Label(name, 1.0) for name in names]


@given(st.text(), PLACES)
def test_text_is_never_cut_inside_a_letter(text: str, places: list[int]) -> None:
    reader = MessageReader(Text)
    got = [message for chunk in cut(text.encode(), places) for message in reader.read(chunk)] + reader.end()

    assert "".join(message.text for message in got) == text
    assert Text("") not in got


def test_chunks_that_are_no_messages_are_refused(rest: Callable[..., Any]) -> None:
    client = rest(FakeServer(httpx.Response(200, content=b'{"name": "cat", "score": 1.0}\n\xff')))

    assert run(client.stream("a", b"x")) == [b'{"name": "cat", "score": 1.0}\n\xff']
    for kind in (Label, Text):
        with pytest.raises(UnexpectedAnswer):
            run(client.stream("a", b"x", answer=kind))
    with pytest.raises(TypeError, match="one Photo from the next"):
        run(client.stream("a", b"x", answer=Photo))


# What is left before its end


class Endless(httpx.SyncByteStream, httpx.AsyncByteStream):
    """One chunk after another, for ever."""

    def __iter__(self) -> Iterator[bytes]:
        while True:
            yield b"chunk\n"

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            await asyncio.sleep(0)
            yield chunk


class StreamServer:
    """Streams, and keeps the calls that call off."""

    def __init__(self, cancelled: httpx.Response | Exception | None = None) -> None:
        self.reply = cancelled or reply(200, {"cancelled": True})
        self.asked: list[httpx.Request] = []
        self.cancels: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if "x-cancel" not in request.headers:
            self.asked.append(request)
            return httpx.Response(200, stream=Endless())
        self.cancels.append(request)
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply


class LeavingError(Exception):
    """The consumer's own."""


def leave(client: Any, how: str, **named: Any) -> None:
    """Take one chunk of a stream, and leave it."""
    stream = client.stream("a b", b"x", "1.0", **named)

    def use(chunk: bytes) -> None:
        assert chunk == b"chunk\n"
        if how == "raised":
            raise LeavingError

    def plain() -> None:
        with client, contextlib.suppress(LeavingError), contextlib.closing(stream):
            use(next(stream))

    async def aio() -> None:
        async with client:
            with contextlib.suppress(LeavingError):
                async with contextlib.aclosing(stream):
                    use(await anext(stream))

    if inspect.isasyncgen(stream):
        asyncio.run(aio())
    else:
        plain()


@pytest.mark.parametrize("how", ["closed", "raised"])
@pytest.mark.parametrize("options", [None, Options(cancel_key="mine")])
def test_a_stream_that_is_left_is_called_off(rest: Callable[..., Any], how: str, options: Options | None) -> None:
    server = StreamServer()
    leave(rest(server, token="one"), how, options=options)
    (asked,), (cancel,) = server.asked, server.cancels
    key = asked.headers["x-cancel-key"]

    assert key == "mine" if options else len(key) == 32
    assert (cancel.headers["x-cancel"], cancel.content, cancel.url) == (key, b"{}", asked.url)
    assert cancel.headers["authorization"] == "Bearer one"


def test_a_loop_that_raises_leaves_its_stream() -> None:
    server = StreamServer()

    def consume() -> None:
        for _ in RestClient(transport=httpx.MockTransport(server)).stream("a", b"x"):
            raise LeavingError

    with pytest.raises(LeavingError):
        consume()
    assert len(server.cancels) == 1


@pytest.mark.parametrize("answer", [reply(500), httpx.ConnectError("refused"), RuntimeError("anything")])
def test_calling_off_never_raises_and_is_tried_once(rest: Callable[..., Any], answer: Any) -> None:
    server = StreamServer(answer)
    leave(rest(server), "closed")

    assert len(server.cancels) == 1


def test_a_stream_past_its_deadline_is_called_off(rest: Callable[..., Any]) -> None:
    server = StreamServer()
    with pytest.raises(DeadlineExceeded):
        run(rest(server).stream("a", b"x", timeout=0.1))

    assert len(server.cancels) == 1


def test_a_stream_that_cannot_be_read_is_called_off(rest: Callable[..., Any]) -> None:
    server = StreamServer()
    with pytest.raises(UnexpectedAnswer):
        run(rest(server).stream("a", b"x", answer=Label))

    assert len(server.cancels) == 1


def test_what_has_ended_is_not_called_off(rest: Callable[..., Any]) -> None:
    server = FakeServer(httpx.Response(200, content=b"all"), reply(415, FAILURE), reply(200, FAILURE))
    client = rest(server)
    assert run(client.stream("a", b"x")) == [b"all"]
    for _ in range(2):
        with pytest.raises(RequestRefused):
            run(client.stream("a", b"x"))

    assert len(server.requests) == 3


@pytest.mark.parametrize("kind", [RestClient, AsyncRestClient])
def test_the_deadline_holds_against_a_server_that_trickles(kind: Any) -> None:
    """The timeout of httpx would begin anew with every byte."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                try:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                    for _ in range(1000):
                        connection.sendall(b"1")
                        time.sleep(0.05)
                except OSError:
                    pass  # the client has left

        thread = threading.Thread(target=trickle)
        thread.start()
        client = kind(f"http://127.0.0.1:{listener.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"0\.4 s"):
            run(client.predict("a", b"x", timeout=0.4))
        assert 0.35 < time.monotonic() - began < 25  # of the 50 s that it all would take
        thread.join()


# gRPC, against a server in this process


JAVA = "org.pytorch.serve"
ABORTS = {
    "nobody": (grpc.StatusCode.INTERNAL, f"Model not found: nobody\n{JAVA}.archive.model.ModelNotFoundException"),
    "busy": (grpc.StatusCode.INTERNAL, 'Model "busy" has no worker to serve inference …\nInternalServerException.()'),
    "unnamed": (grpc.StatusCode.INTERNAL, "Parameter model_name is required.\nBadRequestException.()"),
    "raises": (grpc.StatusCode.UNAVAILABLE, f"Prediction failed\n{JAVA}.http.InternalServerException"),
    "killed": (grpc.StatusCode.RESOURCE_EXHAUSTED, f"Out of memory\n{JAVA}.http.InternalServerException"),
    "locked": (grpc.StatusCode.PERMISSION_DENIED, "Token Authorization failed. Token either incorrect, …"),
    "large": (grpc.StatusCode.CANCELLED, "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))"),
    "full": (
        grpc.StatusCode.UNAVAILABLE,
        'Model "full" has no worker to serve inference …\nInternalServerException.()',
    ),
    "limited": (grpc.StatusCode.RESOURCE_EXHAUSTED, "local_rate_limited"),
    "lost": (grpc.StatusCode.UNAVAILABLE, "Socket closed"),
}


class Inference(inference_pb2_grpc.InferenceAPIsServiceServicer):
    """Does what the model's name says, as TorchServe does it: the live tests hold the clients to that."""

    seen: Any = None

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.calls: list[dict[str, bytes]] = []

    def Ping(self, request: Any, context: Any) -> Any:
        return inference_pb2.TorchServeHealthResponse(health='{"status": "Unhealthy"}')

    def Predictions(self, request: Any, context: Any) -> Any:
        self.seen = (dict(request.input), request.model_version, dict(context.invocation_metadata()))
        if "x-cancel" in request.input:
            self.calls.append(dict(request.input))
            self.cancelled.set()
            return inference_pb2.PredictionResponse(prediction=b'{"cancelled": true}')
        if request.model_name in ABORTS:
            context.abort(*ABORTS[request.model_name])
        if request.model_name == "refused":  # the front door's
            context.set_trailing_metadata((("x-failure", json.dumps(FAILURE)),))
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "No.")
        if request.model_name == "slow":
            time.sleep(0.5)
        if request.model_name == "refuses":
            return inference_pb2.PredictionResponse(prediction=json.dumps(FAILURE, indent=2).encode())
        return inference_pb2.PredictionResponse(prediction=request.input["body"])

    def StreamPredictions(self, request: Any, context: Any) -> Any:
        self.calls.append(dict(request.input))
        if request.model_name == "a b":
            yield inference_pb2.PredictionResponse(prediction=b"chunk\n")
            self.cancelled.wait(30)
        yield inference_pb2.PredictionResponse(prediction=b"one")
        yield inference_pb2.PredictionResponse(prediction=b"two")
        if request.model_name == "breaks":
            yield inference_pb2.PredictionResponse(prediction=b"\n" + FAILED + b"\n")


class Management(management_pb2_grpc.ManagementAPIsServiceServicer):
    def ListModels(self, request: Any, context: Any) -> Any:
        assert request.limit == 100  # 0 lists nothing
        return management_pb2.ManagementResponse(msg='{"models": [{"modelName": "a"}]}')

    def DescribeModel(self, request: Any, context: Any) -> Any:
        more = {"customizedMetadata": {"says": "a"}} if request.customized else {}
        return management_pb2.ManagementResponse(msg=json.dumps([DESCRIBED | more]))


@pytest.fixture
def served() -> Iterator[tuple[str, Inference]]:
    server = grpc.server(ThreadPoolExecutor(4))
    inference = Inference()
    inference_pb2_grpc.add_InferenceAPIsServiceServicer_to_server(inference, server)
    management_pb2_grpc.add_ManagementAPIsServiceServicer_to_server(Management(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", inference
    server.stop(None).wait()


def over_grpc(kind: Any, address: str, method: str, *values: Any, retries: int = 0, **named: Any) -> Any:
    if kind is GrpcClient:
        with GrpcClient(address, address, token="one", management_token="two", retries=retries) as client:
            return run(getattr(client, method)(*values, **named))

    async def call() -> Any:
        async with AsyncGrpcClient(address, address, token="one", management_token="two", retries=retries) as client:
            result = getattr(client, method)(*values, **named)
            return [chunk async for chunk in result] if inspect.isasyncgen(result) else await result

    return asyncio.run(call())


both = pytest.mark.parametrize("kind", [GrpcClient, AsyncGrpcClient])


@both
def test_grpc_sends_the_message_and_parameters_as_inputs(kind: Any, served: tuple[str, Inference]) -> None:
    address, server = served
    answer = over_grpc(kind, address, "predict", "a", OBJECTS, "1.0", answer=Objects, parameters={"top": "3"})
    inputs, version, metadata = server.seen

    assert answer == OBJECTS
    assert 29_000 < int(inputs.pop("x-timeout-ms")) <= 30_000
    sent = {"body": body_of(OBJECTS).content, "content-type": b"application/json", "top": b"3"}
    assert (inputs, version) == (sent, "1.0")
    assert metadata["authorization"] == "Bearer one"


@both
def test_grpc_sends_a_message_in_parts_as_inputs(kind: Any, served: tuple[str, Inference]) -> None:
    address, inference = served
    over_grpc(kind, address, "predict", "a", {"body": b"1", "caption": "gr\u00fcn"}, parameters={"top": "3"})
    sent, _, _ = inference.seen

    del sent["x-timeout-ms"]
    assert sent == {"body": b"1", "caption": "gr\u00fcn".encode(), "parameters.top": b"3"}


@both
def test_grpc_sends_options_as_inputs(kind: Any, served: tuple[str, Inference]) -> None:
    address, server = served
    asked = {name: value.encode() for name, value in ASKED.items()}

    over_grpc(kind, address, "predict", "a", b"{}", options=OPTIONS)
    assert server.seen[0] == {"body": b"{}", **asked}
    over_grpc(kind, address, "stream", "a", b"{}", options=OPTIONS)
    assert server.calls == [{"body": b"{}", "x-pieces": b"true", **asked}]


@both
def test_grpcs_stream_ends_with_its_failure(kind: Any, served: tuple[str, Inference]) -> None:
    address, server = served
    with pytest.raises(RequestRefused):
        over_grpc(kind, address, "stream", "breaks", b"x")

    assert not server.cancelled.is_set()


@both
@pytest.mark.parametrize("how", ["closed", "raised"])
def test_a_grpc_stream_that_is_left_is_called_off(kind: Any, served: tuple[str, Inference], how: str) -> None:
    address, server = served
    leave(kind(address, address), how)
    asked, cancel = server.calls

    assert cancel == {"body": b"{}", "x-cancel": asked["x-cancel-key"]}


@both
def test_a_grpc_stream_past_its_deadline_is_called_off(kind: Any, served: tuple[str, Inference]) -> None:
    address, server = served
    with pytest.raises(DeadlineExceeded):
        over_grpc(kind, address, "stream", "a b", b"x", timeout=0.3)

    assert server.cancelled.is_set()


def test_a_task_that_is_cancelled_calls_its_stream_off(served: tuple[str, Inference]) -> None:
    address, server = served

    async def leave_it() -> None:
        taken = asyncio.Event()

        async def consume() -> None:
            async for _ in client.stream("a b", b"x"):
                taken.set()

        async with AsyncGrpcClient(address, address) as client:
            task = asyncio.create_task(consume())
            await taken.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert server.cancelled.is_set()

    asyncio.run(leave_it())


@both
def test_grpc_asks_the_same_questions(kind: Any, served: tuple[str, Inference]) -> None:
    address, _ = served

    assert over_grpc(kind, address, "stream", "a", b"x") == [b"one", b"two"]
    assert [model.name for model in over_grpc(kind, address, "models")] == ["a"]
    assert over_grpc(kind, address, "describe", "a")["customizedMetadata"] == {"says": "a"}
    assert not over_grpc(kind, address, "ready")


@both
@pytest.mark.parametrize(
    ("model", "expected", "status", "unserved"),
    [
        ("nobody", ModelNotFound, 404, False),
        ("busy", Overloaded, 503, True),
        ("full", Overloaded, 503, True),
        ("unnamed", RequestRefused, 400, False),
        ("raises", ServerFailed, 503, False),
        ("killed", ServerFailed, 507, False),
        ("locked", Unauthorized, 401, False),
        ("large", TooLarge, 413, False),
        ("limited", Overloaded, 429, True),
        ("lost", ConnectionLost, 502, False),
        ("slow", DeadlineExceeded, 504, False),
        ("refuses", RequestRefused, 415, False),
        ("refused", RequestRefused, 415, False),
    ],
)
def test_grpcs_failures_are_rests(
    kind: Any, served: tuple[str, Inference], model: str, expected: Any, status: int, *, unserved: bool
) -> None:
    with pytest.raises(ServingError) as caught:
        over_grpc(kind, served[0], "predict", model, b"x", timeout=0.3 if model == "slow" else 30)

    assert (type(caught.value), caught.value.status, caught.value.unserved) == (expected, status, unserved)


@both
@pytest.mark.parametrize("model", ["refuses", "refused"])
def test_a_models_failure_over_grpc_has_all_that_the_worker_said(
    kind: Any, served: tuple[str, Inference], model: str
) -> None:
    """In TorchServe's answer, or beside the status that the front door makes of it."""
    with pytest.raises(RequestRefused) as caught:
        over_grpc(kind, served[0], "predict", model, b"x")

    error = caught.value
    assert (error.type, error.message, error.node, error.request_id) == ("InputError", "No.", "detect", "r1")


@both
def test_grpc_finds_a_server_that_comes_up_while_it_tries(kind: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(Unreachable, match=address):
        over_grpc(kind, address, "predict", "a", b"x", timeout=30)

    server = grpc.server(ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceAPIsServiceServicer_to_server(Inference(), server)
    start = threading.Timer(0.3, lambda: (server.add_insecure_port(address), server.start()))
    start.start()
    try:
        assert over_grpc(kind, address, "predict", "a", b"1", retries=6, timeout=60) == 1
    finally:
        start.join()
        server.stop(None).wait()


def test_the_kept_stubs_are_what_the_pinned_tools_make(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "stubs"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    kept = [path for folder in (protos, open_inference_protos) for path in Path(folder.__path__[0]).glob("*_pb2*.py*")]

    for path in kept:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), f"{path.name}: run scripts/stubs"
    assert len(list(tmp_path.iterdir())) == len(kept) == 10


def test_an_answer_that_is_nested_as_deep_as_no_json_is_no_traceback() -> None:
    deep = b"[" * 200_000

    assert answer_as(Text, deep) == Text(deep.decode())
    assert answer_as(None, deep) == deep
    assert error_from_http(502, deep, None).message == deep[:300].decode()
