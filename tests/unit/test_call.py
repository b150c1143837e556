"""`torchserve-dag call` against an HTTP server in this process."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from torchserve_dag.commands import app

PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background ignores it
from torchserve_dag.commands import app
app()
"""
"""The command as a program of its own."""


class Model(BaseHTTPRequestHandler):
    """Answers with what its name says; `endless` when it is cancelled."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append(dict(self.headers.items()))
        name = self.path.rpartition("/")[2]
        if "x-cancel" in self.headers:
            self.server.cancelled.set()
            self.answer(b'{"cancelled": true}')
        elif name == "endless":
            self.send_response(200)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"3\r\none\r\n")
            self.server.cancelled.wait(60)
            self.close_connection = True
        else:
            self.answer(b"one two")

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Model)
        self.asked: list[dict[str, str]] = []
        self.cancelled = threading.Event()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.cancelled.set()
        found.shutdown()
        thread.join()


def call(server: Server, project: Path, *words: str) -> subprocess.Popen[bytes]:
    (project / "hello.txt").write_text("hello")
    address = f"http://127.0.0.1:{server.server_port}"
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "call", *words, "hello.txt", "--server", address],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def run(server: Server, project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command in this process."""
    (project / "hello.txt").write_text("hello")
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.chdir(project)
    return lambda *words: CliRunner().invoke(app, ["call", *words, "hello.txt", "--server", address])


def test_outputs_and_bulk_are_options(server: Server, run: Callable[..., Result]) -> None:
    done = run("echo", "--output", "detect", "--output", "classify", "--bulk")
    (asked,) = server.asked

    assert (done.stdout_bytes, done.exit_code) == (b"one two", 0)
    assert (asked["x-outputs"], asked["x-priority"]) == ("detect,classify", "bulk")


def test_a_stream_is_printed_and_ends_with_a_newline(server: Server, run: Callable[..., Result]) -> None:
    done = run("echo", "--stream")

    assert (done.stdout_bytes, done.exit_code) == (b"one two\n", 0)
    assert not server.cancelled.is_set()


def test_ctrl_c_calls_the_stream_off(server: Server, project: Path) -> None:
    with call(server, project, "endless", "--stream") as command:
        assert command.stdout
        assert command.stdout.read(3) == b"one"
        command.send_signal(signal.SIGINT)
        rest, _ = command.communicate(timeout=500)
    asked, cancel = server.asked

    assert (rest, command.returncode) == (b"\n", 130)
    assert cancel["x-cancel"] == asked["x-cancel-key"]


@pytest.mark.parametrize("words", [("--param", "body=x"), ("--param", "x-outputs=detect"), ("--output", "détecte")])
def test_what_cannot_be_sent_is_one_sentence(
    server: Server, run: Callable[..., Result], words: tuple[str, str]
) -> None:
    done = run("echo", *words)

    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not server.asked


def test_the_server_and_the_token_may_be_in_the_environment(server: Server, tmp_path: Path) -> None:
    """As in a container, in a folder that is no project."""
    (tmp_path / "hello.txt").write_text("hello")
    address = f"http://127.0.0.1:{server.server_port}"
    found = CliRunner(env={"TORCHSERVE_DAG_SERVER": address, "TORCHSERVE_DAG_TOKEN": "secret"}).invoke(
        app, ["call", "echo", str(tmp_path / "hello.txt")]
    )

    assert (found.exit_code, found.stdout) == (0, "one two")
    assert server.asked[0]["authorization"] == "Bearer secret"


def test_a_token_of_a_file_goes_before_that_of_the_environment(server: Server, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("of-the-file\n")
    words = ["call", "echo", str(tmp_path / "token"), "--token-file", str(tmp_path / "token")]
    CliRunner(env={"TORCHSERVE_DAG_TOKEN": "of-the-environment"}).invoke(
        app, [*words, "--server", f"http://127.0.0.1:{server.server_port}"]
    )

    assert server.asked[0]["authorization"] == "Bearer of-the-file"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--server", "host:8443"], '"host:8443" is not an address'),
        (["--server", "http://127.0.0.1:1", "--insecure"], "is not encrypted"),
        (["--server", "https://127.0.0.1:1", "--ca", "/nowhere.pem"], "/nowhere.pem: No such file"),
        (["--server", "https://127.0.0.1:1", "--token-file", "/nowhere"], "/nowhere: No such file"),
        (["--server", "https://127.0.0.1:1"], "cannot be reached"),
    ],
)
def test_a_server_that_cannot_be_called_is_one_sentence(tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "hello.txt").write_text("hello")
    found = CliRunner().invoke(app, ["call", "echo", str(tmp_path / "hello.txt"), *words])

    assert (found.exit_code, found.stderr.count("\n")) == (1, 1)
    assert said in found.stderr


def test_status_of_a_server_that_is_not_up_fails(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["status", "--server", "https://127.0.0.1:1"])

    assert found.exit_code == 1
    assert "is not up" in found.stderr
