"""`torchserve-dag call` against an HTTP server in this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
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
        self.server.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append({name.lower(): value for name, value in self.headers.items()})
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
        elif name == "french":
            self.answer('{"text": "\u00e9t\u00e9 \u2026"}'.encode())
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
        self.bodies: list[bytes] = []
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


# What is sent: a file, the standard input, a pipe, the fields of a message.


def send(server: Server, *words: str, stdin: bytes | None = None) -> Result:
    address = f"http://127.0.0.1:{server.server_port}"
    return CliRunner().invoke(app, ["call", "echo", *words, "--server", address], input=stdin)


@pytest.mark.parametrize("words", [("-",), ("/dev/stdin",), ()])
def test_the_standard_input_is_sent(server: Server, words: tuple[str, ...]) -> None:
    done = send(server, *words, stdin=b"\x89PNG\r\n\x1a\n...")

    assert (done.exit_code, server.bodies) == (0, [b"\x89PNG\r\n\x1a\n..."])
    assert server.asked[0]["content-type"] == "image/png"


def test_a_program_may_write_into_a_call(server: Server, tmp_path: Path) -> None:
    """As `call echo <(date)` in a shell, and `date | call echo`."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"of a pipe",))
    writer.start()
    done = send(server, str(pipe))
    writer.join()
    address = f"http://127.0.0.1:{server.server_port}"
    command = [sys.executable, "-c", PROGRAM, "call", "echo", "--server", address]
    piped = subprocess.run(command, input=b"piped", capture_output=True, timeout=500, check=True)

    assert (done.exit_code, piped.stdout) == (0, b"one two")
    assert server.bodies == [b"of a pipe", b"piped"]


def test_a_message_is_sent_field_by_field(server: Server, tmp_path: Path) -> None:
    photo = tmp_path / "a=b.png"
    photo.write_bytes(b"\x89PNG\r\n\x1a\n...")
    done = send(server, f"photo=@{photo}", "caption=a=b", "empty=", "--param", "user=ada")
    whole = send(server, str(photo))
    (form, alone), types = server.bodies, [asked["content-type"] for asked in server.asked]

    assert (done.exit_code, whole.exit_code) == (0, 0)
    assert types[0].startswith("multipart/form-data")
    for name, value in (
        ("photo", b"\x89PNG"),
        ("caption", b"a=b\r\n"),
        ("empty", b"\r\n"),
        ("parameters.user", b"ada"),
    ):
        _, _, part = form.partition(f'name="{name}"'.encode())
        assert part.partition(b"\r\n\r\n")[2].startswith(value)
    assert (alone[:4], types[1]) == (b"\x89PNG", "image/png"), "a file whose name has a = is a file"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nowhere.txt",), "nowhere.txt is not a file"),
        ((".",), ". is not a file"),
        (("photo=@nowhere.txt",), "nowhere.txt is not a file"),
        (("a=1", "hello"), '"hello" is neither FIELD=VALUE nor FIELD=@FILE'),
        (("a=1", "a=2"), "a is given twice"),
    ],
)
def test_what_is_nothing_to_send_is_one_sentence(server: Server, words: tuple[str, ...], says: str) -> None:
    done = send(server, *words)

    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert says in done.stderr
    assert not server.asked


ESCAPED = rb'"text": "\u00e9t\u00e9 \u2026"'


@pytest.mark.parametrize(
    ("environment", "more", "printed"),
    [
        ({"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, [], ESCAPED),
        ({"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, ["--json"], ESCAPED),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, ["--json"], ESCAPED),
        ({"PYTHONIOENCODING": "utf-8"}, ["--json"], '"text": "\u00e9t\u00e9 \u2026"'.encode()),
    ],
)
def test_an_answer_is_printed_on_a_terminal_that_has_ascii_only(
    server: Server, project: Path, environment: dict[str, str], more: list[str], printed: bytes
) -> None:
    command = [sys.executable, "-c", PROGRAM, "call", "french", "-", *more]
    command += ["--server", f"http://127.0.0.1:{server.server_port}"]
    done = subprocess.run(
        command, input=b"", capture_output=True, env={**os.environ, **environment}, timeout=500, check=False
    )

    assert (done.returncode, done.stderr) == (0, b"")
    assert printed in done.stdout


COMMANDS = (
    ["check"], ["check", "--json"], ["graph", "flow"], ["graph", "flow", "--json"], ["build", "flow"], ["status"],
    ["status", "flow"], ["routes"], ["token", "list"], ["check", "\u00e9"], ["call", "\u00e9", "\u00e9"],
    ["rollback", "\u00e9"], ["default", "\u00e9", "1.0"], ["experiment", "\u00e9"], ["down"],
)  # fmt: skip


def test_every_command_prints_on_a_terminal_that_has_ascii_only(project: Path, write: Callable[..., Path]) -> None:
    """Its help too. A character that the terminal lacks would raise."""
    write("answer: {function: \u00e9t\u00e9}", "def \u00e9t\u00e9(text: Text) -> Text: return text\n")
    group = typer.main.get_group(app)
    helps = [[*words, "--help"] for words in ([], *([name] for name in group.commands))]
    runner = CliRunner(charset="ascii")
    for words in [*helps, *([*command, "--project", str(project)] for command in COMMANDS)]:
        done = runner.invoke(app, words)

        assert done.exception is None or isinstance(done.exception, SystemExit), (words, done.exception)
        assert done.stdout_bytes.isascii()
        assert done.stderr_bytes.isascii()
