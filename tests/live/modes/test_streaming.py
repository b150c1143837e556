"""A workflow whose answer comes in chunks, through a real TorchServe: over REST and gRPC, to the end and not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from tests.live.conftest import Serving, on_direct
from torchserve_dag.clients import KeyFile, RequestRefused, ServingError
from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.messages import Text
from torchserve_dag.runtime.protos.inference_pb2 import PredictionsRequest
from torchserve_dag.runtime.protos.inference_pb2_grpc import InferenceAPIsServiceStub
from torchserve_dag.server.connect import host_client as client
from torchserve_dag.stack.connect import client as through

WITHIN_S = 60
PACE_S = 0.4
"""How long a slow word takes."""

FILES = {
    "workflows/tell.yaml": """
        name: tell
        version: "1.0"
        does: Tells a text word by word.
        nodes: {tell: {function: tell}}
        output: tell
        serve: {timeout_s: 15}
        """,
    "workflows/tell.py": f"""
        from __future__ import annotations
        import time
        from collections.abc import Iterator
        from pathlib import Path
        from torchserve_dag import InputError, Text

        def tell(request: Text) -> Iterator[Text]:
            for word in request.text.split():
                if word == "bad":
                    raise InputError("That word is bad.", 422)
                if word == "slow":
                    time.sleep({PACE_S})
                while word.startswith("gate:") and not Path(word[5:]).exists():
                    time.sleep(0.01)
                yield Text(word + " ")
        """,
    "workflows/told.yaml": """
        name: told
        version: "1.0"
        does: The same, in two versions.
        code: tell.py
        nodes: {tell: {function: tell}}
        output: tell
        """,
    "workflows/told-2.0.yaml": """
        name: told
        version: "2.0"
        does: The same, in two versions.
        code: tell.py
        nodes: {tell: {function: tell}}
        output: tell
        """,
    "workflows/measure.yaml": """
        name: measure
        version: "1.0"
        does: Gives each word of a text with its length.
        code: measure.py
        nodes: {split: {function: split}}
        output: split
        """,
    "workflows/measure.py": """
        from __future__ import annotations
        from collections.abc import Iterator
        from dataclasses import dataclass
        from torchserve_dag import Text

        @dataclass(frozen=True)
        class Word:
            text: str
            size: int

        def split(request: Text) -> Iterator[Word]:
            for word in request.text.split():
                yield Word(word, len(word))
        """,
    "workflows/whole.yaml": """
        name: whole
        version: "1.0"
        does: Gives a text in capitals, in one chunk.
        nodes: {capitals: {function: capitals}}
        output: capitals
        """,
    "workflows/whole.py": """
        from torchserve_dag import Text

        def capitals(request: Text) -> Text: return Text(request.text.upper())
        """,
    "routes.yaml": 'told: {versions: {"1.0": 50, "2.0": 50}, fallback: "1.0", slow_s: 0.5}\n',
}


@pytest.fixture
def http(server: Serving) -> Iterator[httpx.Client]:
    tokens = KeyFile.read(server.state.key_file)
    headers = {"Authorization": f"Bearer {tokens.inference}", "Content-Type": "text/plain"}
    with httpx.Client(base_url=server.addresses.inference, headers=headers, timeout=30, trust_env=False) as found:
        yield found


STREAMED = ("tell", "told", "measure", "whole")


def workers(server: Serving) -> dict[str, tuple[int, bool]]:
    """Each model's worker: its pid, and whether it is ready."""
    with server.rest() as rest:
        return {
            m.name: (w.pid, w.ready) for m in rest.models() if m.name in STREAMED for v in m.versions for w in v.workers
        }


def test_over_rest_the_chunks_arrive_one_by_one(http: httpx.Client, tmp_path: Path) -> None:
    """The worker waits at the gate until the first is here."""
    gate = tmp_path / "gate"
    chunks = []
    with http.stream("POST", "/predictions/tell", content=f"now gate:{gate} slow slow") as response:
        for chunk in response.iter_raw():
            chunks.append(chunk)
            gate.touch()

    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert b"".join(chunks) == f"now gate:{gate} slow slow ".encode()
    assert len(chunks) == 4


WAYS = [client, through]
"""To TorchServe itself, and through the front door."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_both_clients_give_the_chunks_as_they_come(server: Serving, protocol: Any, way: Any, tmp_path: Path) -> None:
    """The worker waits at the gate until the first is here."""
    gate = tmp_path / "gate"
    found = []
    with way(server.state, protocol) as serving:
        for chunk in serving.stream("tell", Text(f"now gate:{gate} slow"), answer=Text):
            found.append(chunk)
            gate.touch()

    assert found == [Text("now "), Text(f"gate:{gate} "), Text("slow ")]


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_chunks_that_are_no_text_are_lines_of_json(server: Serving, protocol: Any) -> None:
    with client(server.state, protocol) as serving:
        found = list(serving.stream("measure", Text("a bc")))

    assert b"".join(found) == b'{"text": "a", "size": 1}\n{"text": "bc", "size": 2}\n'


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_a_failure_in_the_middle_comes_after_the_chunks_before_it(server: Serving, protocol: Any, way: Any) -> None:
    found: list[Text] = []
    with way(server.state, protocol) as serving, pytest.raises(RequestRefused) as refused:
        found.extend(serving.stream("tell", Text("slow bad"), answer=Text))

    assert found == [Text("slow ")]
    assert (refused.value.status, refused.value.message) == (422, "That word is bad.")


@on_direct
@pytest.mark.parametrize("size", [1, 100_000], ids=["small", "large"])
def test_over_grpc_a_failure_in_the_middle_is_the_status_of_the_call(server: Serving, size: int) -> None:
    """With its type and node as gRPC's libraries look for them."""
    token = KeyFile.read(server.state.key_file).inference
    word = "w" * size
    found: list[bytes] = []
    with grpc.insecure_channel(server.addresses.grpc_inference) as channel:
        asked = PredictionsRequest(model_name="tell", input={"body": f"{word} slow {word} bad".encode()})
        call = InferenceAPIsServiceStub(channel).StreamPredictions(
            asked, timeout=WITHIN_S, metadata=(("authorization", f"Bearer {token}"),)
        )
        with pytest.raises(grpc.RpcError) as failed:
            found.extend(answer.prediction for answer in call)

    assert found == [f"{word} ".encode(), b"slow ", f"{word} ".encode()]
    assert (failed.value.code().name, failed.value.details()) == ("INVALID_ARGUMENT", "That word is bad.")
    status = Status.FromString(dict(failed.value.trailing_metadata())["grpc-status-details-bin"])
    info = ErrorInfo()
    status.details[0].Unpack(info)
    assert (info.reason, info.domain, info.metadata["node"]) == ("InputError", "torchserve-dag", "tell")


def test_a_failure_before_the_first_chunk_has_its_own_status(http: httpx.Client) -> None:
    response = http.post("/predictions/tell", content="bad")

    assert (response.status_code, response.json()["message"]) == (422, "That word is bad.")


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_through_the_front_door_a_stream_is_never_cut_and_its_cancel_finds_its_version(
    server: Serving, protocol: Any
) -> None:
    """Longer than the fallback's limit for whole answers; and where it is left, no version has it any more."""
    with through(server.state, protocol) as serving:
        assert len(list(serving.stream("told", Text("now slow slow"), answer=Text))) == 3
        for i in range(8):
            options = Options(cancel_key=f"left-{protocol}-{i}")
            with closing(serving.stream("told", Text("now " + "slow " * 20), answer=Text, options=options)) as chunks:
                assert next(chunks) == Text("now ")

    tokens = KeyFile.read(server.state.key_file)
    for i in range(8):
        for version in ("1.0", "2.0"):
            found = httpx.post(
                f"{server.addresses.inference}/predictions/told/{version}",
                headers={"Authorization": f"Bearer {tokens.inference}", "x-cancel": f"left-{protocol}-{i}"},
                trust_env=False,
            )
            assert found.json() == {"cancelled": False}


def test_a_stream_that_is_left_is_cancelled(server: Serving, http: httpx.Client) -> None:
    """TorchServe does not tell its worker; our client does, and then its key is unknown there."""
    with server.rest() as rest, closing(
        rest.stream("tell", Text("now " + "slow " * 20), answer=Text, options=Options(cancel_key="left"))
    ) as chunks:  # fmt: skip
        assert next(chunks) == Text("now ")

    assert http.post("/predictions/tell", headers={"x-cancel": "left"}).json() == {"cancelled": False}


def test_a_cancelled_stream_ends_with_word_of_it(http: httpx.Client) -> None:
    with http.stream(
        "POST", "/predictions/tell", content="now " + "slow " * 20, headers={"X-Cancel-Key": "mine"}
    ) as response:
        chunks = response.iter_raw()
        assert next(chunks) == b"now "
        assert http.post("/predictions/tell", headers={"x-cancel": "mine"}).json() == {"cancelled": True}
        rest = b"".join(chunks)

    assert rest.count(b"slow") < 15
    assert b'"Cancelled"' in rest.splitlines()[-1]


def test_calls_over_grpc_that_do_not_ask_for_chunks_get_the_whole(server: Serving) -> None:
    """TorchServe does not tell its worker which call it is, and a second chunk to Predictions would end it. So there
    only a client that says so gets chunks.
    """
    before = workers(server)
    token = KeyFile.read(server.state.key_file).inference
    with grpc.insecure_channel(server.addresses.grpc_inference) as channel:
        stub = InferenceAPIsServiceStub(channel)
        asked = PredictionsRequest(model_name="tell", input={"body": b"one two"})
        metadata = (("authorization", f"Bearer {token}"),)
        streamed = [answer.prediction for answer in stub.StreamPredictions(asked, timeout=20, metadata=metadata)]
        unary = stub.Predictions(asked, timeout=20, metadata=metadata)

    assert unary.prediction == b"one two "
    assert streamed == ([b"one two "] if server.host == "torchserve" else [b"one ", b"two "])
    assert workers(server) == before


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_a_workflow_that_does_not_stream_answers_a_stream_in_one_chunk(server: Serving, protocol: Any) -> None:
    before = workers(server)
    with client(server.state, protocol) as serving:
        found = list(serving.stream("whole", Text("a")))
        again = serving.predict("whole", Text("b"), answer=Text)

    assert (found, again) == ([b'{"text": "A"}'], Text("B"))
    assert workers(server) == before


def test_streams_run_side_by_side(server: Serving) -> None:
    with server.grpc() as serving, ThreadPoolExecutor(4) as threads:
        began = time.monotonic()
        found = list(threads.map(lambda _: list(serving.stream("tell", Text("now " * 10))), range(4)))
        took = time.monotonic() - began

    assert [len(chunks) for chunks in found] == [10] * 4
    assert took < 60


def test_a_worker_that_is_killed_in_mid_stream_says_so_to_its_client(server: Serving) -> None:
    pid, _ = workers(server)["tell"]
    found: list[bytes] = []

    def listen(chunks: Iterator[bytes]) -> None:
        for chunk in chunks:
            if not found:
                os.kill(pid, signal.SIGKILL)
            found.append(chunk)

    with server.rest() as rest:
        with pytest.raises(ServingError) as died:
            listen(rest.stream("tell", Text("now " + "slow " * 20)))
        assert died.value.status == (507 if server.host == "torchserve" else 502)
        while not rest.ready("tell"):
            time.sleep(0.1)
        assert list(rest.stream("tell", Text("again"))) == [b"again "]
    assert found[0] == b"now "
