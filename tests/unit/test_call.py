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

from torchserve_dag.clients import RestClient
from torchserve_dag.commands import app

PROGRAM = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background ignores it
from torchserve_dag.clients import RestClient
from torchserve_dag.commands import app
from torchserve_dag.stack import connect
address = sys.argv.pop(1)
connect.client = lambda state, protocol: RestClient(address, address)
app()
"""
"""The command as a program of its own, with the address of a server that no `up` has started."""


class Model(BaseHTTPRequestHandler):
    """Answers with what its name says; `endless` when it is called off."""

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
        [sys.executable, "-c", PROGRAM, address, "call", *words, "hello.txt"],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def run(server: Server, project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command in this process."""
    (project / "hello.txt").write_text("hello")
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("torchserve_dag.stack.connect.client", lambda state, protocol: RestClient(address, address))
    monkeypatch.chdir(project)
    return lambda *words: CliRunner().invoke(app, ["call", *words, "hello.txt"])


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
