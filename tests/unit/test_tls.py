"""Clients and TLS: which certificate is trusted, and what is said when plain and TLS meet."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest

from torchserve_dag.clients import AsyncGrpcClient, AsyncRestClient, GrpcClient, RestClient, TlsFailed, Unreachable
from torchserve_dag.clients.settings import Settings
from torchserve_dag.front_door import certificate
from torchserve_dag.runtime.protos import inference_pb2, inference_pb2_grpc

KINDS: list[Any] = [RestClient, AsyncRestClient, GrpcClient, AsyncGrpcClient]
every_client = pytest.mark.parametrize("kind", KINDS)


class Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A handshake that fails is what the tests are about."""


class Inference(inference_pb2_grpc.InferenceAPIsServiceServicer):
    def Predictions(self, request: Any, context: Any) -> Any:  # noqa: N802 (grpc's name)
        return inference_pb2.PredictionResponse(prediction=request.input["body"])


@dataclass(frozen=True)
class Ports:
    """Ports that speak TLS, with the certificate that they show, and ports that do not; by the client's protocol."""

    certificate: Path
    encrypted: dict[str, int]
    plain: dict[str, int]


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    folder = tmp_path_factory.mktemp("tls")
    shown, key = folder / "development.pem", folder / "development.key"
    certificate._make(shown, key)
    http, https = (QuietServer(("127.0.0.1", 0), Echo) for _ in range(2))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown, key)
    https.socket = context.wrap_socket(https.socket, server_side=True, do_handshake_on_connect=False)
    threads = [threading.Thread(target=one.serve_forever) for one in (http, https)]
    calls = grpc.server(ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceAPIsServiceServicer_to_server(Inference(), calls)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), shown.read_bytes())])
    encrypted = {"rest": https.server_port, "grpc": calls.add_secure_port("127.0.0.1:0", credentials)}
    plain = {"rest": http.server_port, "grpc": calls.add_insecure_port("127.0.0.1:0")}
    calls.start()
    for thread in threads:
        thread.start()
    yield Ports(shown, encrypted, plain)
    calls.stop(None).wait()
    for server, thread in zip((http, https), threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


def predict(kind: Callable[..., Any], *values: Any, **named: Any) -> Any:
    """One call with a client that is made for it."""
    client = kind(*values, timeout=20, retries=0, **named)
    if isinstance(client, RestClient | GrpcClient):
        with client:
            return client.predict("echo", b"hi", answer=bytes)

    async def call() -> Any:
        async with client:
            return await client.predict("echo", b"hi", answer=bytes)

    return asyncio.run(call())


@every_client
def test_the_certificate_that_is_given_is_trusted(kind: Any, ports: Ports) -> None:
    for host in ("127.0.0.1", "localhost"):
        assert predict(kind, f"https://{host}:{ports.encrypted[kind.protocol]}", ca=ports.certificate) == b"hi"


@every_client
def test_an_unknown_certificate_is_refused_with_the_way_to_trust_it(kind: Any, ports: Ports) -> None:
    with pytest.raises(TlsFailed, match=r"^https://127\.0\.0\.1:\d+ shows a certificate that is not trusted.* ca="):
        predict(kind, f"https://127.0.0.1:{ports.encrypted[kind.protocol]}")


@every_client
def test_insecure_accepts_any_certificate(kind: Any, ports: Ports) -> None:
    assert predict(kind, f"https://127.0.0.1:{ports.encrypted[kind.protocol]}", insecure=True) == b"hi"


@every_client
def test_a_certificate_for_another_name_says_so(kind: Any, ports: Ports) -> None:
    where, trusted = f"https://127.0.0.1:{ports.encrypted[kind.protocol]}", {"ca": ports.certificate}
    with pytest.raises(TlsFailed, match="issued for another name"):
        predict(kind, where, server_name="door.example", **trusted)

    assert predict(kind, where, server_name="localhost", **trusted) == b"hi"


@every_client
def test_plain_to_a_port_of_tls_says_so(kind: Any, ports: Ports) -> None:
    port = ports.encrypted[kind.protocol]
    with pytest.raises(TlsFailed, match=rf"answers only over TLS.*: write https://127\.0\.0\.1:{port}\. "):
        predict(kind, f"http://127.0.0.1:{port}")


@every_client
def test_tls_to_a_plain_port_says_so(kind: Any, ports: Ports) -> None:
    with pytest.raises(TlsFailed, match=r"does not answer over TLS: write http://HOST:PORT"):
        predict(kind, f"https://127.0.0.1:{ports.plain[kind.protocol]}", ca=ports.certificate)


@pytest.mark.parametrize("kind", [GrpcClient, AsyncGrpcClient])
def test_over_grpc_a_bare_address_is_encrypted_when_a_certificate_is_given(kind: Any, ports: Ports) -> None:
    assert predict(kind, f"127.0.0.1:{ports.encrypted['grpc']}", ca=ports.certificate) == b"hi"
    assert predict(kind, f"127.0.0.1:{ports.plain['grpc']}") == b"hi"
    assert predict(kind, f"http://127.0.0.1:{ports.plain['grpc']}") == b"hi"


def test_waiting_does_not_mend_tls(ports: Ports) -> None:
    with RestClient(f"https://127.0.0.1:{ports.encrypted['rest']}") as client, pytest.raises(TlsFailed):
        client.ready()


@every_client
def test_where_nothing_listens_tls_is_not_the_reason(kind: Any, ports: Ports) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        for scheme in ("http", "https"):
            with pytest.raises(Unreachable, match="cannot be reached"):
                predict(kind, f"{scheme}://127.0.0.1:{free.getsockname()[1]}")


@every_client
def test_settings_that_cannot_work_are_refused_at_once(kind: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("no certificate")
    with pytest.raises(ValueError, match=r"empty\.pem holds no certificate"):
        kind("https://door.example", ca=empty)
    with pytest.raises(OSError, match=r"missing\.pem"):
        kind("https://door.example", ca=tmp_path / "missing.pem")
    with pytest.raises(ValueError, match="not both"):
        kind("https://door.example", ca=empty, insecure=True)
    with pytest.raises(ValueError, match="is not encrypted"):
        kind("http://door.example", insecure=True)


def test_models_are_not_asked_of_the_front_door() -> None:
    with RestClient("https://door.example") as client, pytest.raises(ValueError, match="management="):
        client.models()


def test_the_four_clients_have_the_same_parameters_and_show_no_token() -> None:
    shared = list(Settings.__dataclass_fields__)
    for kind in KINDS:
        fields = list(kind.__dataclass_fields__)
        assert [name for name in fields if name != "transport"] == shared
        assert "secret" not in repr(kind(token="secret", management_token="secret"))  # noqa: S106
