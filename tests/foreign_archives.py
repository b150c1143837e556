"""An archive that does what it is told, requests to it, and what TorchServe 0.12.0 answers; a live test asks it again.

And the direct host of one archive, as a program: the model on its main thread, HTTP on another.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

WITHIN_S = 120
"""What only a hang reaches."""

TOLD = """
    def shown(value):
        plain = isinstance(value, (str, int, dict, list))
        return [type(value).__name__, value if plain else bytes(value).decode("latin-1")]

    def seen(row, headers):
        own = {name.lower(): about for name, about in headers.items()}
        names = ["explain", "url_path", "describe", "x-one", *row]
        return {"row": {name: shown(value) for name, value in row.items()}, "headers": {n: own.get(n.lower()) for n in names}}

    def handle(data, context):
        if data is None:
            return None
        answers = []
        for i, row in enumerate(data):
            headers = context.get_all_request_header(i)
            code = headers.get("do") or headers.get("Do")
            scope = {"context": context, "i": i, "row": row, "data": data}
            exec(code or "", scope)
            if "whole" in scope:
                return scope["whole"]
            answers.append(scope["answer"] if code else seen(row, headers))
        return answers
"""
"""Runs the Python of the header `do`: `answer` is what it answers, `whole` what it answers instead of a list. Without
that header it answers with what it was given.
"""


@dataclass(frozen=True)
class Exchange:
    """A request, and what TorchServe answers."""

    what: str
    send: Mapping[str, Any]
    """The arguments of httpx."""
    body: Any
    """Of JSON the data, else the bytes."""
    status: int = 200
    headers: Mapping[str, str | None] = field(default_factory=dict)
    """Of the response; None: it has no such header."""


def _told(code: str, body: Any, status: int = 200, **headers: str | None) -> Exchange:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Exchange(code, {"headers": {"do": code}}, body, status, {"content-type": None} | named)


def _failed(code: str, status: int, message: str) -> Exchange:
    body = {"code": status, "type": "InternalServerException", "message": message}
    return Exchange(code, {"headers": {"do": code}}, body, status, {"content-type": "application/json"})


def _seen(what: str, row: Mapping[str, Any], types: Mapping[str, str] | None = None, **send: Any) -> Exchange:
    """A request, and the row and the headers that its handler gets."""
    about = {name: {"content-type": (types or {}).get(name, "")} for name in row}
    headers = {"explain": "False", "url_path": "", "describe": None, "x-one": None, **about}
    return Exchange(what, send, {"row": row, "headers": headers})


_JSON, _TEXT = {"content-type": "application/json"}, {"content-type": "text/plain"}
_PREDICTION_EXCEPTION = "from ts.utils.util import PredictionException as Odd; raise Odd('Too odd.', {})"
_HEADERS = (
    "answer = b'x'; context.set_response_content_type(i, 'image/png'); context.set_response_header(i, 'X-Two', 'b')"
)
_OF_THE_SERVER = "answer = 'x'; context.set_response_header(i, 'Content-Length', '9')"

EXCHANGES = (
    _seen("JSON", {"body": ["dict", {"a": 1}]}, {"body": "application/json"}, content='{"a": 1}', headers=_JSON),
    _seen(
        "JSON with a charset",
        {"body": ["list", [1]]},
        {"body": "application/json"},
        content="[1]",
        headers={"content-type": "application/json; charset=utf-8"},
    ),
    _seen("no JSON", {"body": ["bytearray", "{bad"]}, {"body": "application/json"}, content="{bad", headers=_JSON),
    _seen(
        "text",
        {"body": ["str", "\u00fc"]},
        {"body": "text/csv"},
        content="\u00fc",
        headers={"content-type": "text/csv"},
    ),
    _seen("no UTF-8", {"body": ["bytearray", "\u00fc"]}, {"body": "text/plain"}, content=b"\xfc", headers=_TEXT),
    _seen("bytes", {"body": ["bytearray", "raw"]}, content=b"raw"),
    _seen("nothing", {"body": ["bytearray", ""]}),
    _seen("parameters, which no handler sees", {"body": ["bytearray", "raw"]}, content=b"raw", params={"data": "x"}),
    _seen("a form", {"data": ["bytearray", "a b"], "x": ["bytearray", "1"]}, data={"data": "a b", "x": "1"}),
    _seen(
        "a form in parts",
        {
            "data": ["bytearray", '{"a": 1}'],
            "file": ["dict", {"a": 1}],
            "text": ["str", "a"],
            "photo": ["bytearray", "b"],
        },
        {"file": "application/json", "text": "text/plain", "photo": "application/octet-stream"},
        files=[
            ("data", (None, '{"a": 1}', "application/json")),
            ("file", ("f", '{"a": 1}', "application/json")),
            ("text", ("t", "a", "text/plain; charset=utf-8")),
            ("photo", ("p", "b", "application/octet-stream")),
        ],
    ),
    Exchange(
        "headers",
        {"content": b"", "headers": {"explain": "True", "url_path": "a/b", "X-One": "1"}},
        {
            "row": {"body": ["bytearray", ""]},
            "headers": {
                "explain": "False",
                "url_path": "",
                "describe": None,
                "x-one": "1",
                "body": {"content-type": ""},
            },
        },
    ),
    _told("answer = 'text'", b"text"),
    _told("answer = bytearray(b'bytes')", b"bytes"),
    _told("answer = {'a': [1, None]}", b'{\n  "a": [\n    1,\n    null\n  ]\n}'),
    _told("answer = None", b"null"),
    _told(_HEADERS, b"x", content_type="image/png", x_two="b"),
    _told("answer = 'x'; context.set_response_header(i, 'Content-Type', 'text/html')", b"x", content_type="text/html"),
    _told(_OF_THE_SERVER, b"x", content_length="1"),
    _told("answer = 'short and stout'; context.set_response_status(418, 'teapot', i)", b"short and stout", 418),
    _told("answer = ''; context.set_response_status(204, '', i)", b"", 204),
    _failed("raise KeyError('secret')", 503, "Prediction failed"),
    _failed("raise MemoryError", 507, "Out of resources"),
    _failed("raise RuntimeError('CUDA error: no more')", 507, "Out of resources"),
    _failed(_PREDICTION_EXCEPTION.format(422), 422, "Too odd."),
    _failed("whole = 'text'", 503, "Invalid model predict output"),
    _failed("whole = {}", 503, "Invalid model predict output"),
    _failed("whole = []", 503, "number of batch response mismatched"),
    _failed("answer = object()", 503, "Unsupported model output data type."),
)
"""What is the same under TorchServe and under the direct host."""


def check(exchange: Exchange, answer: httpx.Response) -> None:
    """Compare an answer with TorchServe's. The direct host adds to a failure where its reason is found."""
    body: Any = exchange.body
    assert answer.status_code == exchange.status, answer.text
    for name, value in exchange.headers.items():
        assert answer.headers.get(name) == value
    if isinstance(body, bytes):
        assert answer.content == body
    elif "message" in body:
        found = answer.json()
        assert {key: found[key] for key in ("code", "type")} == {key: body[key] for key in ("code", "type")}
        assert found["message"].startswith(body["message"].rstrip("."))
    else:
        assert answer.json() == body


_HOST = """
import logging, sys, threading, time
from pathlib import Path
from torchserve_dag.direct import http
from torchserve_dag.direct.app import DirectApp
from torchserve_dag.direct.entrance import Entrance
from torchserve_dag.direct.torchserve_archive import load

logging.basicConfig(stream=sys.stderr, level=logging.INFO)
listening = http.listen("127.0.0.1", 0)
service = load(Path(sys.argv[1]), None)

async def serve():
    entrance = Entrance(service)
    app = DirectApp(lambda name, version: entrance if name == service.name else None, 2**24)
    await http.serve(app, listening, lambda _: print(f"serves at port {listening.getsockname()[1]}", flush=True))

threading.Thread(target=http.run, args=(serve(),), daemon=True).start()
service.run()
"""


class Host:
    """The program, running."""

    def __init__(self, folder: Path, before: str = "", **environment: str) -> None:
        """`before` is Python that it runs first."""
        self.said = ""
        command = [sys.executable, "-c", before + _HOST, str(folder)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
            env={**os.environ, **environment},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.said += line

    @property
    def address(self) -> str:
        self.wait_for(lambda: "serves at port" in self.said)
        return f"http://127.0.0.1:{re.findall('serves at port (.*)', self.said)[0]}"

    def wait_for(self, true: Callable[[], Any]) -> None:
        end = time.monotonic() + WITHIN_S
        while not true():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.02)

    def ended(self) -> str:
        """Wait until it has ended by itself. Returns what it said."""
        self.process.wait(WITHIN_S)
        self._reader.join(WITHIN_S)
        return self.said


@contextmanager
def hosted(folder: Path, **environment: str) -> Iterator[Host]:
    """The direct host of an unpacked archive."""
    host = Host(folder, **environment)
    try:
        yield host
    finally:
        host.process.kill()
        host.process.wait()


def ask(address: str, model: str, **send: Any) -> httpx.Response:
    with httpx.Client(timeout=WITHIN_S, trust_env=False) as http:
        return http.post(f"{address}/predictions/{model}", **send)


def manifest(**more: Any) -> str:
    return json.dumps(
        {"runtime": "python", "model": {"modelName": "m", "modelVersion": "1.0", "handler": "handler.py", **more}}
    )
