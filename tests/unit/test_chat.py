"""`torchserve-dag chat` against a server of OpenAI's API in this process."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from torchserve_dag.clients import ConnectionLost, DeadlineExceeded, Overloaded, Unreachable
from torchserve_dag.clients.chat import ChatClient
from torchserve_dag.commands import app

PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background ignores it
from torchserve_dag.commands import app
app()
"""
REFUSALS = {
    "refused": (400, "top_p: it is 2"),
    "full": (429, "Too many tokens."),
    "none": (404, "There is no such model.", "model_not_found"),
}
USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}


class ChatServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Model)
        self.asked: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.left = threading.Event()
        """Set when a client left an endless answer."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Model(BaseHTTPRequestHandler):
    """Answers as the model's name says."""

    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        self.server.tokens.append(self.headers.get("authorization"))
        if self.path != "/v1/chat/completions" or body["model"] in REFUSALS:
            self.refuse(*REFUSALS[body["model"]])
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b": a comment, as servers send to keep a connection\n\n")
        getattr(self, body["model"])()

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        error = json.dumps({"error": {"message": message, "type": "", "param": None, "code": code}}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(error)))
        self.send_header("x-request-id", "abc")
        self.end_headers()
        self.wfile.write(error)

    def event(self, **fields: Any) -> None:
        self.wfile.write(f"data: {json.dumps(fields)}\n\n".encode())
        self.wfile.flush()

    def text(self, text: str, reason: str | None = None) -> None:
        self.event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": reason}])

    def capital(self) -> None:
        self.event(choices=[{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}])
        for part in ("Par", "is \u00e9t\u00e9"):
            self.text(part)
        self.text(".", "stop")
        self.event(choices=[], usage=USAGE)
        self.wfile.write(b"data: [DONE]\n\n")

    def long(self) -> None:
        self.text("One two", "length")
        self.wfile.write(b"data: [DONE]\n\n")

    def broken(self) -> None:
        self.text("Half an ")

    def failing(self) -> None:
        self.text("Half an ")
        self.event(error={"message": "The worker ended.", "type": "server_error"})

    def odd(self) -> None:
        self.wfile.write(b"data: no JSON\n\n")

    def steering(self) -> None:
        self.text("\x1b]0;a title\x07\x1b[2Jtext")
        self.wfile.write(b"data: [DONE]\n\n")

    def silent(self) -> None:
        self.server.left.wait(60)

    def endless(self) -> None:
        try:
            while True:
                self.text("on ")
                time.sleep(0.01)
        except OSError:
            self.server.left.set()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield serving
        serving.left.set()
        serving.shutdown()
        thread.join()


def ask(server: ChatServer, model: str, *words: str, question: str = "Capital?") -> Result:
    return CliRunner().invoke(app, ["chat", model, "--server", server.url, *words], input=question)


def test_a_question_that_is_piped_in_gets_its_answer_alone(server: ChatServer) -> None:
    done = ask(server, "capital", "--token", "secret")

    assert (done.exit_code, done.stdout) == (0, "Paris \u00e9t\u00e9.\n")
    assert server.tokens == ["Bearer secret"]
    assert server.asked == [
        {
            "model": "capital",
            "messages": [{"role": "user", "content": "Capital?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_the_options_go_with_the_question(server: ChatServer) -> None:
    ask(server, "capital", "--system", "Be brief.", "--max-tokens", "5", "--temperature", "0")
    (asked,) = server.asked

    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (asked["max_tokens"], asked["temperature"]) == (5, 0)


def test_as_json_an_answer_has_its_reason_and_its_tokens(server: ChatServer) -> None:
    done = ask(server, "capital", "--json")

    assert json.loads(done.stdout) == {
        "model": "capital",
        "answer": "Paris \u00e9t\u00e9.",
        "finish_reason": "stop",
        "usage": USAGE,
    }


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("refused", "error: top_p: it is 2 (400 RequestRefused, request abc)"),
        ("full", "error: Too many tokens. (429 Overloaded, request abc)"),
        ("none", "error: There is no such model. (404 ModelNotFoundException, request abc)"),
        ("failing", "error: The worker ended. (500 ServerFailed)"),
        ("broken", "closed the connection before it answered: the answer has no end. (502 ConnectionLost)"),
        ("odd", "sent no chat: Expecting value: line 1 column 2 (char 1). (502 UnexpectedAnswer)"),
    ],
)
def test_an_answer_that_fails_is_one_sentence_after_what_came(server: ChatServer, model: str, said: str) -> None:
    done = ask(server, model)

    assert done.exit_code == 1
    assert said in done.stderr
    assert done.stdout in {"", "Half an \n"}
    assert len(done.stderr.splitlines()) == 1


def test_nothing_piped_in_is_said(server: ChatServer) -> None:
    done = ask(server, "capital", question=" \n")

    assert done.exit_code == 1
    assert "The standard input is empty" in done.stderr
    assert server.asked == []


def test_an_answer_that_stops_coming_and_a_server_that_is_not_there_have_their_own_errors(server: ChatServer) -> None:
    with ChatClient(server.url, timeout=0.2) as client, pytest.raises(DeadlineExceeded):
        list(client.answer("silent", []))
    with ChatClient(server.url) as client, pytest.raises(Overloaded):
        list(client.answer("full", []))
    with ChatClient(server.url) as client, pytest.raises(ConnectionLost):
        list(client.answer("broken", []))
    with ChatClient("http://127.0.0.1:1") as client, pytest.raises(Unreachable):
        list(client.answer("capital", []))


class Terminal:
    """The command as a program in a terminal of its own."""

    def __init__(self, server: ChatServer, model: str, *words: str) -> None:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-c", PROGRAM, "chat", model, "--server", server.url, *words]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
        os.close(theirs)
        self._terminal = ours
        self.text = ""
        self._at = 0

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def read_until(self, pattern: str) -> None:
        """Read on until the pattern is in what comes after the last such pattern."""
        while not (found := re.compile(pattern).search(self.text, self._at)):
            try:
                read = os.read(self._terminal, 65536)
            except OSError:  # its other end is closed
                read = b""
            assert read, self.text
            self.text += read.decode("utf-8", "replace")
        self._at = found.end()

    def end(self) -> int:
        """Type ctrl-D, and return the exit status."""
        self.type("\x04")
        status = self.process.wait(60)
        os.close(self._terminal)
        return status


def test_a_chat_in_a_terminal_remembers_what_was_said_until_it_is_begun_anew(server: ChatServer) -> None:
    terminal = Terminal(server, "capital")
    terminal.read_until("> ")
    for line in ("One?", "Two?", "/new"):
        terminal.type(f"{line}\n")
        terminal.read_until("> " if line == "/new" else r"2 tokens in[^>]*> ")
    terminal.type("Three?\n")
    terminal.read_until(r"2 tokens in[^>]*> ")

    assert terminal.end() == 0
    assert [[one["content"] for one in asked["messages"]] for asked in server.asked] == [
        ["One?"],
        ["One?", "Paris \u00e9t\u00e9.", "Two?"],
        ["Three?"],
    ]


def test_ctrl_c_stops_the_answer_and_not_the_program(server: ChatServer) -> None:
    terminal = Terminal(server, "endless")
    terminal.read_until("> ")
    terminal.type("Go on.\n")
    terminal.read_until("on on on")
    terminal.process.send_signal(signal.SIGINT)
    terminal.read_until(r"stopped[^>]*> ")

    assert server.left.wait(60)
    assert terminal.process.poll() is None
    assert terminal.end() == 0


def test_an_error_ends_neither_the_chat_nor_stays_in_it(server: ChatServer) -> None:
    terminal = Terminal(server, "refused")
    for _ in range(2):
        terminal.read_until("> ")
        terminal.type("Hello?\n")
        terminal.read_until("top_p: it is 2")
    terminal.read_until("> ")

    assert terminal.end() == 0
    assert [len(asked["messages"]) for asked in server.asked] == [1, 1]


def test_what_would_steer_the_terminal_is_not_printed(server: ChatServer) -> None:
    terminal = Terminal(server, "steering")
    terminal.read_until("> ")
    terminal.type("Hello?\n")
    terminal.read_until(r"2Jtext[^>]*> ")

    assert "\x1b[2J" not in terminal.text
    assert "\x1b]0;" not in terminal.text
    assert terminal.end() == 0
