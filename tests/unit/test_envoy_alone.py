"""What the front door's Envoy lets through, refuses and says, with a small upstream in TorchServe's place."""

from __future__ import annotations

import contextlib
import json
import random
import re
import stat
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from loadtests.hostile import Http2
from tests.unit.envoy_alone import WITHIN_S, Alone, Answer, Upstream, alone
from torchserve_dag.front_door import access_logs, http_filters, overload
from torchserve_dag.front_door.backend import MODELS
from torchserve_dag.front_door.local_replies import LIMITED
from torchserve_dag.front_door.settings import FrontDoor, Limits
from torchserve_dag.front_door.splits import ServedVersion
from torchserve_dag.runtime.protos.inference_pb2 import PredictionsRequest
from torchserve_dag.server.sockets import SocketTransport

SERVED = (
    ServedVersion("echo", "1.0", 30.0, ours=True),
    ServedVersion("theirs", "1.0", 30.0, ours=False),
    ServedVersion("local", "1.0+cpu", 30.0, ours=True),
)
MAX_BODY = 1_000_000
JSON = {"content-type": "application/json"}
FORM = "application/x-www-form-urlencoded"
END = b"\r\n\r\n"


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    settings = FrontDoor(limits=Limits(headers_s=3, body_s=3))
    with alone(tmp_path_factory.mktemp("alone"), SERVED, settings, MAX_BODY) as found:
        yield found


@pytest.fixture(autouse=True)
def upstream(door: Alone) -> Iterator[Upstream]:
    """As at its start before each test."""
    there, fresh = door.upstream, (lambda _: Answer(), lambda *_: b'{"text": "hi"}')
    there.rest, there.grpc = fresh
    there.healthy = True
    there.received.clear()
    there.called.clear()
    return there


def request(**entries: bytes) -> PredictionsRequest:
    return PredictionsRequest(model_name="echo", input={"data": b"hi", **entries})


def curl(door: Alone, *words: str) -> tuple[str, str]:
    """What curl prints of an answer, and says of an error."""
    command = ["curl", "-sSi", "--cacert", str(door.certificate), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    return done.stdout, done.stderr


class TestPing:
    @pytest.mark.parametrize("path", ["/ping", "/ping?x=1", "/ping?"])
    def test_it_needs_no_token_and_reaches_nobody(self, door: Alone, path: str) -> None:
        with door.http(None) as http:
            found = [http.request(method, path) for method in ("GET", "HEAD") for _ in range(50)]

        assert {one.status_code for one in found} == {200}
        assert found[0].json() == {"status": "Healthy"}
        assert not door.upstream.received

    def test_it_says_within_a_second_or_so_what_the_server_says(self, door: Alone) -> None:
        with door.http(None) as http:
            door.upstream.healthy = False
            door.until(lambda: http.get("/ping").status_code == 503)
            assert http.get("/ping").json() == {"status": "Unhealthy"}
            door.upstream.healthy = True
            door.until(lambda: http.get("/ping").status_code == 200)

    def test_the_server_is_asked_once_a_second_however_many_ask(self, door: Alone) -> None:
        before = len(door.upstream.pings)
        with door.http(None) as http:
            began = time.monotonic()
            while time.monotonic() - began < 2:
                http.get("/ping")
        asked, took = len(door.upstream.pings) - before, time.monotonic() - began

        assert asked <= took + 2

    @pytest.mark.parametrize(
        "odd",
        [
            b"POST /ping HTTP/1.1\r\nHost: x\r\nContent-Length: 100000",
            b"GET /ping HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 100000",
            b"GET /ping HTTP/1.1\r\nHost: x\r\nExpect: nothing",
            b"GET /ping HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked",
            b"OPTIONS /ping HTTP/1.1\r\nHost: x",
        ],
    )
    def test_an_odd_one_changes_nothing_for_others(self, door: Alone, odd: bytes) -> None:
        with door.target.tls("http/1.1") as connection, door.http(None) as http:
            connection.sendall(odd + END)

            assert {http.get("/ping").status_code for _ in range(20)} == {200}


class TestTokens:
    @pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
    def test_the_schemes_case_is_the_clients_choice(self, door: Alone, scheme: str) -> None:
        with door.http(None) as http:
            found = http.post("/predictions/echo", content=b"hi", headers={"authorization": f"{scheme} {door.token}"})

        assert found.status_code == 200
        assert door.upstream.received[0].headers["authorization"] != f"{scheme} {door.token}"

    def test_a_token_with_limits_has_openais_api_only(self, door: Alone) -> None:
        limited = door.door.issue_token("bob", 60, tokens_per_minute=5)
        with door.http(limited) as http:
            v1, elsewhere = http.get("/v1/models"), http.post("/predictions/echo", content=b"hi")
            door.door.revoke_token("bob")
            revoked = http.get("/v1/models")
        other = door.door.issue_token("carol", 60, models=["m"])
        with door.grpc() as grpc_stub, pytest.raises(grpc.RpcError) as call:
            grpc_stub.Predictions(request(), metadata=[("authorization", f"Bearer {other}")], timeout=WITHIN_S)

        assert v1.status_code == 503, "there is no gateway behind this door"
        assert v1.json()["error"]["code"] == "Overloaded"
        assert v1.headers["retry-after"] == "1"
        assert (elsewhere.status_code, elsewhere.json()["message"]) == (403, LIMITED.message)
        assert call.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert call.value.details() == LIMITED.message
        assert "revoked" in revoked.json()["error"]["message"]
        assert not door.upstream.received

    def test_the_gateway_alone_may_say_whose_request_it_is(self, door: Alone) -> None:
        said = {"x-door-token": "bob"}
        with door.http() as http:
            http.post("/predictions/echo", content=b"hi", headers=said)
        transport = SocketTransport(door.door.folder / MODELS)
        with httpx.Client(transport=transport, base_url="http://models", timeout=WITHIN_S) as gateway:
            answer = gateway.post("/predictions/echo", content=b"hi", headers=said)

        assert answer.status_code == 200
        assert answer.headers["x-model-version"] == "1.0"
        assert [one.headers["x-door-token"] for one in door.upstream.received] == ["alice", "bob"]
        assert stat.S_IMODE((door.door.folder / MODELS).stat().st_mode) == 0o600

    def test_a_token_is_taken_from_the_header_only(self, door: Alone) -> None:
        with door.http(None) as http:
            for name in ("access_token", "token", "authorization"):
                assert http.post(f"/predictions/echo?{name}={door.token}", content=b"hi").status_code == 401
            assert http.get("/predictions/echo", headers={"cookie": f"access_token={door.token}"}).status_code == 401

        assert not door.upstream.received

    @pytest.mark.parametrize(
        "path", ["/", "/models", "/predictions/echo", "/predictions/nobody", "/feedback", "/ping/", "/x"]
    )
    def test_without_one_every_path_is_alike(self, door: Alone, path: str) -> None:
        with door.http(None) as http:
            found = {http.request(method, path).status_code for method in ("GET", "POST", "DELETE", "OPTIONS")}

        assert found == {401}

    def test_the_answer_comes_before_the_body(self, door: Alone) -> None:
        """Whoever has no token has nothing buffered: the answer comes though the body never does."""
        head = b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 900000" + END

        assert door.raw(head).startswith(b"HTTP/1.1 401")


class TestBodies:
    def test_a_form_is_passed_as_it_was_sent(self, door: Alone) -> None:
        """TorchServe would read `a=b` out of it, and fail for `x=%`."""
        with door.http() as http:
            for body in (b'{"text": "I like a=b"}', b"x=%", b"\xff\xd8\xff&=", b"hello"):
                for kind in (FORM, f"{FORM.upper()}; charset=latin-1", f"{FORM} ;x=y"):
                    assert (
                        http.post("/predictions/echo", content=body, headers={"content-type": kind}).status_code == 200
                    )
                    got = door.upstream.received.pop()
                    assert got.body == body
                    assert got.headers["content-type"].startswith("application/vnd.torchserve-dag.form")
                    assert ("charset=latin-1" in got.headers["content-type"]) == ("charset" in kind)

    def test_a_form_for_somebody_elses_handler_is_torchserves_to_read(self, door: Alone) -> None:
        with door.http() as http:
            http.post("/predictions/theirs", content=b"data=1", headers={"content-type": FORM})

        assert door.upstream.received[0].headers["content-type"] == FORM

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (500, "ErrorDataDecoderException"),
            (500, "NotEnoughDataDecoderException"),
            (403, "IllegalArgumentException"),
        ],
    )
    def test_a_form_that_cannot_be_read_is_the_clients_mistake(self, door: Alone, status: int, kind: str) -> None:
        said = json.dumps({"code": status, "type": kind, "message": "Bad string"}, indent=2).encode()
        door.upstream.rest = lambda _: Answer(said, status, JSON)
        before = door.stat(r"^tries\..*theirs/1_0.*5\d\d.*$")
        with door.http() as http:
            found = http.post("/predictions/theirs", content=b"x=%", headers={"content-type": FORM})

        assert (found.status_code, found.json()["code"], found.json()["type"]) == (400, 400, kind)
        assert door.stat(r"^tries\..*theirs/1_0.*5\d\d.*$") == before

    def test_a_models_own_failure_stays_one(self, door: Alone) -> None:
        body = b'{"code": 500, "type": "InternalError", "message": "ErrorDataDecoderException"}'
        door.upstream.rest = lambda _: Answer(body, 500, JSON)
        with door.http() as http:
            found = http.post("/predictions/echo", content=b"hi")

        assert (found.status_code, found.content) == (500, body)

    def test_a_compressed_form_in_parts_is_refused(self, door: Alone) -> None:
        headers = {"content-type": "multipart/form-data; boundary=x", "content-encoding": "gzip"}
        with door.http() as http:
            found = http.post("/predictions/echo", content=b"\x1f\x8b", headers=headers)

        assert (found.status_code, found.json()["message"]) == (
            415, "A form in parts cannot be compressed: send it without Content-Encoding."
        )  # fmt: skip
        assert not door.upstream.received

    @pytest.mark.parametrize("protocol", ["--http2", "--http1.1", "--http1.0"])
    def test_one_that_is_too_large_is_413(self, door: Alone, protocol: str, tmp_path: Path) -> None:
        """Read to its end, so that the client is not told while it still sends."""
        large = tmp_path / "large"
        large.write_bytes(b"x" * (3 * MAX_BODY))
        auth = f"Authorization: Bearer {door.token}"
        said, error = curl(
            door, protocol, "-H", auth, "--data-binary", f"@{large}", f"https://localhost:{door.port}/predictions/echo"
        )

        assert re.search(r"^HTTP/[\d.]+ 413 ", said, re.MULTILINE), (said, error)
        assert "larger than the 1,000,000 bytes" in json.loads(said.rpartition("\n\n")[2])["message"]
        assert not door.upstream.received

    def test_one_of_unknown_size_is_413_too(self, door: Alone) -> None:
        def chunks() -> Iterator[bytes]:
            for _ in range(2 * http_filters.ANSWER_BYTES // 2**16):
                yield b"x" * 2**16

        with door.http() as http:
            assert http.post("/predictions/echo", content=chunks()).status_code == 413
        assert not door.upstream.received

    def test_when_it_arrived_is_the_front_doors_to_say(self, door: Alone) -> None:
        before = time.time() * 1000
        with door.http() as http:
            http.post("/predictions/echo", content=b"hi", headers={"x-arrived-ms": "5"})
        with door.grpc() as stub:
            stub.Predictions(request(**{"x-arrived-ms": b"5"}), metadata=[*door.metadata, ("x-arrived-ms", "5")])
        said = [door.upstream.received[0].headers["x-arrived-ms"], door.upstream.called[0].input["x-arrived-ms"]]

        assert all(before - 1000 < int(one) < time.time() * 1000 + 1000 for one in said)


class TestProtocols:
    def test_http_1_0_is_answered(self, door: Alone) -> None:
        head = f"GET /predictions/echo HTTP/1.0\r\nAuthorization: Bearer {door.token}".encode()

        assert door.raw(head + END).startswith(b"HTTP/1.0 200 OK")

    @pytest.mark.parametrize(
        "head",
        [
            b"CONNECT localhost:8443 HTTP/1.1\r\nHost: localhost",
            b"CONNECT localhost:8443 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer TOKEN",
            b"GET /predictions/echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nAuthorization: Bearer TOKEN",
            b"GET /predictions/echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket",
        ],
    )
    def test_nothing_is_tunnelled_or_upgraded(self, door: Alone, head: bytes) -> None:
        said = door.raw(head.replace(b"TOKEN", door.token.encode()) + END)

        assert said.startswith(b"HTTP/1.1 501 ")
        assert b"No connection can be upgraded or tunnelled here" in said
        assert not door.upstream.received

    def test_requests_that_are_pipelined_are_answered_in_order(self, door: Alone) -> None:
        door.upstream.rest = lambda request: Answer(request.path.encode())
        auth = f"Authorization: Bearer {door.token}"
        heads = [f"GET /predictions/echo/1.0/{i} HTTP/1.1\r\nHost: x\r\n{auth}\r\n\r\n" for i in range(5)]
        last = f"GET /predictions/echo/1.0/5 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{auth}\r\n\r\n"
        said = door.raw("".join([*heads, last]).encode())

        assert re.findall(rb"/predictions/echo/1\.0/(\d)", said) == [b"%d" % i for i in range(6)]

    def test_an_absolute_address_is_its_path(self, door: Alone) -> None:
        head = f"GET https://elsewhere/predictions/echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {door.token}"
        assert door.raw(head.encode() + END).startswith(b"HTTP/1.1 200 OK")
        assert door.upstream.received[0].path == "/predictions/echo/1.0"

    @pytest.mark.parametrize(
        ("path", "as_sent"),
        [
            ("/predictions/local/1.0+cpu", "/predictions/local/1.0%2Bcpu"),
            ("/predictions/local/1.0%2Bcpu/more?x=1", "/predictions/local/1.0%2Bcpu/more?x=1"),
            ("/predictions/echo/", "/predictions/echo/1.0"),
            ("//predictions//echo", "/predictions/echo/1.0"),
            ("/predictions/ec%68o/1.0", "/predictions/echo/1.0"),
        ],
    )
    def test_a_name_may_be_escaped(self, door: Alone, path: str, as_sent: str) -> None:
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {door.token}"
        assert door.raw(head.encode() + END).startswith(b"HTTP/1.1 200 OK")
        assert door.upstream.received[0].path == as_sent

    @pytest.mark.parametrize(
        "path",
        [
            "/predictions%2Fecho",
            "/predictions/%5Cecho",
            "/predictions/echo%2f..%2f..%2fmodels",
            "/predictions/e%0Ac",
            "/predictions/%C3%A9",
        ],
    )
    def test_what_is_escaped_never_reaches_another_path(self, door: Alone, path: str) -> None:
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {door.token}"
        found = door.raw(head.encode() + END)

        assert found[:12] in {b"HTTP/1.1 400", b"HTTP/1.1 404"}, found
        assert not door.upstream.received

    def test_every_answer_of_its_own_is_json_that_says_what_to_do(self, door: Alone) -> None:
        auth = f"Authorization: Bearer {door.token}".encode()
        start = b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\n"
        tries = {
            400: start + auth + b"\r\nx_y: 1" + END,
            401: start + b"Connection: close\r\nContent-Length: 0" + END,
            404: b"GET /predictions/nobody HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + auth + END,
            405: b"DELETE /predictions/echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + auth + END,
            408: start + auth + b"\r\nContent-Length: 5" + END + b"a",
            431: start + auth + b"\r\nx-large: " + b"a" * 40_000 + END,
        }
        for status, sent in tries.items():
            head, _, body = door.raw(sent).partition(END)
            assert head.startswith(b"HTTP/1.1 %d " % status), (status, head, body)
            said = json.loads(body)
            assert said["code"] == status
            assert said["message"].endswith(".")
            assert b"content-type: application/json" in head

    def test_an_invalid_request_ends_alone_on_its_connection(self, door: Alone) -> None:
        """Over HTTP/2 a load balancer's connection carries the requests of others."""
        stop = False

        def slow(*_: Any) -> bytes:
            while not stop:
                time.sleep(0.01)
            return b"whole"

        door.upstream.grpc = slow
        with door.grpc() as stub:
            waiting = stub.Predictions.future(request(), metadata=door.metadata)
            door.until(lambda: door.upstream.called)
            with pytest.raises(grpc.RpcError):
                stub.Predictions(request(), metadata=[*door.metadata, ("x_y", "1")], timeout=20)
            stop = True

            assert waiting.result(60).prediction == b"whole"


class TestGrpc:
    @pytest.mark.parametrize("method", ["Predictions", "StreamPredictions"])
    @pytest.mark.parametrize("size", [0, 2, 60_000])
    def test_a_compressed_message_is_read(self, door: Alone, method: str, size: int) -> None:
        sent = PredictionsRequest(model_name="echo", input={"data": random.Random(1).randbytes(size) + b"a" * size})
        with door.grpc(compression=grpc.Compression.Gzip) as stub:
            found = getattr(stub, method)(sent, metadata=door.metadata)
            answer = found if method == "Predictions" else next(iter(found))

        assert answer.prediction == b'{"text": "hi"}'
        assert door.upstream.called[0].input["data"] == sent.input["data"]

    def test_what_would_be_far_larger_than_it_was_sent_is_refused(self, door: Alone) -> None:
        sent = PredictionsRequest(model_name="echo", input={"data": bytes(900_000)})
        with door.grpc(compression=grpc.Compression.Gzip) as stub, pytest.raises(grpc.RpcError) as error:
            stub.Predictions(sent, metadata=door.metadata)

        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "more than 20 times as large" in error.value.details()
        assert not door.upstream.called

    def test_another_compression_is_not_implemented(self, door: Alone) -> None:
        sent = PredictionsRequest(model_name="echo", input={"data": b"a" * 1000})
        with door.grpc(compression=grpc.Compression.Deflate) as stub, pytest.raises(grpc.RpcError) as error:
            stub.Predictions(sent, metadata=door.metadata)

        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "compressed with gzip" in error.value.details()

    @pytest.mark.parametrize("tail", [b"", (5).to_bytes(4, "little"), (900_000).to_bytes(4, "little"), b"\xff" * 4])
    def test_a_message_that_cannot_be_inflated_is_the_clients_mistake(self, door: Alone, tail: bytes) -> None:
        broken = b"\x1f\x8b\x08\x00" + b"garbage!" * 5 + tail
        frame = b"\x01" + len(broken).to_bytes(4, "big") + broken
        with door.http() as http:
            found = http.post(
                "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions",
                content=frame,
                headers={"content-type": "application/grpc", "grpc-encoding": "gzip", "te": "trailers"},
            )

        assert found.headers["grpc-status"] in {"3", "8"}
        assert not door.upstream.called

    @pytest.mark.parametrize(
        "path",
        [
            "/grpc.health.v1.Health/Check",
            "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Nothing",
            "/org.pytorch.serve.grpc.management.ManagementAPIsService/ListModels",
        ],
    )
    def test_an_unknown_method_is_not_implemented(self, door: Alone, path: str) -> None:
        with door.channel() as channel, pytest.raises(grpc.RpcError) as error:
            channel.unary_unary(path)(b"", metadata=door.metadata)

        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED

    def test_an_unknown_model_is_not_found(self, door: Alone) -> None:
        with door.grpc() as stub, pytest.raises(grpc.RpcError) as error:
            stub.Predictions(PredictionsRequest(model_name="nobody", input={"data": b"hi"}), metadata=door.metadata)

        assert error.value.code() is grpc.StatusCode.NOT_FOUND

    @pytest.mark.parametrize(("timeout", "at_most"), [(5, 5000), (0.9, 900)])
    def test_a_calls_deadline_becomes_the_requests_time_limit(self, door: Alone, timeout: float, at_most: int) -> None:
        with door.grpc() as stub:
            stub.Predictions(request(), metadata=door.metadata, timeout=timeout)

        assert 0 < int(door.upstream.called[0].input["x-timeout-ms"]) <= at_most

    def test_a_time_limit_of_the_clients_own_wins(self, door: Alone) -> None:
        with door.grpc() as stub:
            stub.Predictions(request(**{"x-timeout-ms": b"77"}), metadata=door.metadata, timeout=5)

        assert door.upstream.called[0].input["x-timeout-ms"] == b"77"

    @pytest.mark.parametrize(
        ("code", "status"),
        [
            (400, "INVALID_ARGUMENT"),
            (408, "DEADLINE_EXCEEDED"), (404, "NOT_FOUND"), (413, "RESOURCE_EXHAUSTED"), (415, "INVALID_ARGUMENT"),
            (422, "INVALID_ARGUMENT"), (429, "RESOURCE_EXHAUSTED"), (500, "INTERNAL"), (503, "UNAVAILABLE"),
            (504, "DEADLINE_EXCEEDED"), (507, "RESOURCE_EXHAUSTED"),
        ],
    )  # fmt: skip
    def test_a_failure_in_an_answer_is_the_calls_status(self, door: Alone, code: int, status: str) -> None:
        message = 'no "é" \\ 100 %\nin 漢字'
        failure = {"code": code, "type": "InputError", "message": message, "node": "a", "request_id": "7"}
        door.upstream.grpc = lambda *_: json.dumps(failure).encode()
        with door.grpc() as stub, pytest.raises(grpc.RpcError) as error:
            stub.Predictions(request(), metadata=door.metadata)

        assert error.value.code() is getattr(grpc.StatusCode, status)
        assert error.value.details() == message
        assert json.loads(dict(error.value.trailing_metadata())["x-failure"]) == failure

    def test_an_answer_that_only_resembles_one_passes(self, door: Alone) -> None:
        found = []
        bodies = [b'{"code": 200, "type": "x"}', b'[{"code": 500, "type": "x"}]', b"", b"x" * 5_000_000, b'{"code": 5']
        with door.grpc() as stub:
            for body in bodies:
                door.upstream.grpc = lambda *_, body=body: body
                found.append(stub.Predictions(request(), metadata=door.metadata).prediction)

        assert found == bodies

    def test_a_full_queue_is_unavailable(self, door: Alone) -> None:
        def full(_: Any, context: Any) -> bytes:
            text = 'Model "echo" Version 1.0 has no worker to serve inference request.\nInternalServerException.()'
            context.abort(grpc.StatusCode.INTERNAL, text)

        door.upstream.grpc = full
        with door.grpc() as stub, pytest.raises(grpc.RpcError) as error:
            stub.Predictions(request(), metadata=door.metadata)

        assert error.value.code() is grpc.StatusCode.UNAVAILABLE


class TestLog:
    @pytest.mark.parametrize("name", [str(uuid.UUID(int=i << 64 | 0x4_000 << 64 | 0x8 << 60)) for i in range(3)])
    def test_a_clients_request_id_is_kept_as_it_is(self, door: Alone, name: str) -> None:
        with door.http() as http:
            found = http.post("/predictions/echo", content=b"hi", headers={"x-request-id": name})

        assert found.headers["x-request-id"] == door.upstream.received[0].headers["x-request-id"] == name
        assert door.line(name)["status"] == 200

    def test_what_clients_choose_is_cut(self, door: Alone) -> None:
        long = {"x-request-id": "i" * 7000, "traceparent": "t" * 7000, "x-cancel": "c" * 7000}
        with door.http() as http:
            http.post("/predictions/" + "p" * 7000, content=b"hi", headers=long)
        line = door.line("i" * 128)

        assert len(json.dumps(line)) < 2500

    def test_who_has_no_token_writes_a_few_lines_elsewhere_and_is_counted(self, door: Alone) -> None:
        before, lines = door.stat(r"^refused\.count"), len(door.lines(access_logs.REFUSED_LOG))
        kept = len(door.lines(access_logs.REQUESTS_LOG))
        began = time.monotonic()
        with door.http("no.such.token") as http:
            for i in range(400):
                assert (
                    http.post("/predictions/echo", headers={"x-request-id": f"{i}" + "x" * 20_000}).status_code == 401
                )
        with door.http() as http:
            http.post("/predictions/echo", content=b"hi", headers={"x-request-id": "after them"})
        took = time.monotonic() - began
        door.line("after them")

        assert door.until(lambda: door.stat(r"^refused\.count")) - before >= 400
        refused = door.lines(access_logs.REFUSED_LOG)[lines:]
        assert 0 < len(refused) <= access_logs.REFUSED_PER_S * (took + 2)
        assert max(len(json.dumps(one)) for one in refused) < 1500
        assert len(door.lines(access_logs.REQUESTS_LOG)) == kept + 1


class TestMemory:
    """With a tenth of the memory, so that a test fills it in seconds."""

    HEAP = 200 * 2**20

    @pytest.fixture
    def small(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Alone]:
        monkeypatch.setattr(overload, "HEAP_BYTES", self.HEAP)
        with alone(tmp_path, max_body=25_000_000) as found:
            yield found

    def test_who_has_no_token_has_nothing_buffered(self, small: Alone) -> None:
        """A hundred bodies that never end, over one connection: each is answered at once, and forgotten."""
        for path in ("/ping", "/predictions/echo"):
            connection = Http2(small.target)
            streams = [connection.request(path, token=False) for _ in range(100)]
            small.until(lambda streams=streams, connection=connection: connection.answered.issuperset(streams))

            assert connection.send(streams, 2**20, 1) == 0
            assert small.stat("^server.memory_allocated$") < self.HEAP / 4
            connection.close()

    def test_the_largest_streams_are_reset_when_memory_is_short(self, small: Alone) -> None:
        """A token's hundred bodies of 24 MB over one connection: twelve times the memory."""
        connection = Http2(small.target)
        streams = [connection.request("/predictions/echo") for _ in range(100)]
        connection.send(streams, 24_000_000, WITHIN_S)
        reset = small.until(lambda: small.stat(r"^envoy\.overload_actions\.reset_high_memory_stream\.count$"))
        with small.http() as http:
            small.until(lambda: http.post("/predictions/echo", content=b"hi").status_code == 200)

        small.until(lambda: len(connection.reset) >= reset)
        small.until(lambda: small.stat("^server.memory_allocated$") < self.HEAP)  # read every five seconds
        connection.close()

    def test_connections_of_http_1_are_closed_when_memory_is_short(self, small: Alone) -> None:
        """Twenty bodies of 24 MB: more than twice the memory."""
        head = small.target.head("/predictions/echo", "Content-Length: 25000000") + END

        def upload(connection: Any) -> None:
            with contextlib.suppress(OSError):
                for sent in (head, *[b"a" * 2**20] * 23):
                    connection.sendall(sent)

        with contextlib.ExitStack() as held, ThreadPoolExecutor(20) as pool:
            list(pool.map(upload, [held.enter_context(small.target.tls("http/1.1")) for _ in range(20)]))
        said = small.raw(small.target.head("/predictions/echo", "Content-Length: 2", "Connection: close") + END + b"hi")
        assert said[:12] in {b"HTTP/1.1 200", b"HTTP/1.1 503", b""}
        shed = small.stat(r"http1_server_abort_dispatch\.shed_load_count$")
        with small.http() as http:
            small.until(lambda: http.post("/predictions/echo", content=b"hi").status_code == 200)

        assert shed > 0
        small.until(lambda: small.stat("^server.memory_allocated$") < self.HEAP)  # read every five seconds

    def test_an_answer_that_nobody_reads_is_held_here_and_then_reset(self, small: Alone) -> None:
        """Twenty answers of 48 MB: all of it leaves the server behind, and the largest go when memory is short."""
        sent: list[int] = []

        def chunks() -> Iterator[bytes]:
            for _ in range(48):
                yield b"x" * 2**20
            sent.append(48)

        small.upstream.rest = lambda request: Answer(chunks=chunks()) if request.path.endswith("/fat") else Answer()
        connection = Http2(small.target, unread_bytes=65_535)
        streams = [connection.request("/predictions/echo/1.0/fat") for _ in range(20)]
        connection.send(streams, 1, WITHIN_S, end=True)
        small.until(lambda: len(sent) + len(connection.reset) >= len(streams))
        with small.http() as http:
            small.until(lambda: http.post("/predictions/echo", content=b"hi").status_code == 200)

        assert len(connection.reset) > 10
        small.until(lambda: small.stat("^server.memory_allocated$") < self.HEAP)  # read every five seconds
        connection.close()


@pytest.mark.parametrize(("streams", "limits"), [(False, Limits(requests=3)), (True, Limits(streamed=3))])
@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_what_is_inside_of_one_version_is_bounded(
    tmp_path: Path,
    protocol: str,
    streams: bool,  # noqa: FBT001 (a parameter of the test)
    limits: Limits,
) -> None:
    """One more is told at once to come later, and other versions have their own bound."""
    served = (
        ServedVersion("echo", "1.0", 30.0, ours=True, streams=streams),
        ServedVersion("other", "1.0", 30.0, ours=True),
    )
    go, inside, most = threading.Event(), set[int](), [0]

    def slow(request: Any, *_: Any) -> Any:
        if "echo" in (request.path if protocol == "rest" else request.model_name):
            inside.add(threading.get_ident())
            most[0] = max(most[0], len(inside))
            go.wait(WITHIN_S)
            inside.discard(threading.get_ident())
        return Answer() if protocol == "rest" else b"hi"

    with alone(tmp_path, served, FrontDoor(limits=limits)) as door, door.http() as http, door.grpc() as stub:

        def ask(name: str) -> str:
            if protocol == "rest":
                found = http.post(f"/predictions/{name}", content=b"hi")
                return f"{found.status_code} {found.headers.get('retry-after')}"
            try:
                stub.Predictions(PredictionsRequest(model_name=name, input={"data": b"hi"}), metadata=door.metadata)
            except grpc.RpcError as error:
                return str(error.code().name)
            return "answered"

        door.upstream.rest = door.upstream.grpc = slow
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, "echo") for _ in range(6)]
            try:
                door.until(lambda: len(inside) == 3 and sum(one.done() for one in asked) == 3)
                beside = ask("other")
            finally:
                go.set()
            found = Counter(one.result() for one in asked)

    good, full = ("200 None", "503 1") if protocol == "rest" else ("answered", "UNAVAILABLE")
    assert (most, beside, found) == ([3], good, {good: 3, full: 3})


def test_a_model_whose_default_is_not_served_says_so_and_answers_who_names_a_version(door: Alone) -> None:
    """No version that nobody decided on takes the default's requests."""
    before = door.door.traffic()
    door.door.change(lambda now: replace(now, defaults={**now.defaults, "echo": "0.9"}))
    try:
        with door.http() as http:
            unnamed, named = (http.post(f"/predictions/echo{path}", content=b"hi") for path in ("", "/1.0"))
        with door.grpc() as stub:
            with pytest.raises(grpc.RpcError) as error:
                stub.Predictions(request(), metadata=door.metadata)
            stub.Predictions(PredictionsRequest(model_name="echo", model_version="1.0"), metadata=door.metadata)
    finally:
        door.door.change(lambda _: before)

    assert (unnamed.status_code, named.status_code) == (503, 200)
    assert unnamed.json()["message"] == "The default version of echo is not served: name one of 1.0."
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_front_door_without_memory_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "HEAP_BYTES", 6 * 2**20)  # less than it has at its start
    with alone(tmp_path) as door:
        door.until(lambda: door.stat(r"http1_server_abort_dispatch\.scale_percent$") == 100)
        with door.http() as http:
            found = http.post("/predictions/echo", content=b"hi")
        with door.grpc() as stub, pytest.raises(grpc.RpcError) as error:
            stub.Predictions(request(), metadata=door.metadata)

    assert (found.status_code, found.headers["retry-after"], found.json()["type"]) == (503, "1", "Overloaded")
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
