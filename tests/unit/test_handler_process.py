"""Unedited TorchServe handlers, each in a process of its own, as TorchServe gives them one."""

from __future__ import annotations

import importlib
import inspect
import io
import itertools
import json
import locale
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from tests.unit.conftest import Mar, Write
from tests.unit.front_end import FrontEnd
from torchserve_dag.archives.build import build
from torchserve_dag.runtime.compat import archive as archives
from torchserve_dag.runtime.compat.context import Context, RequestProcessor
from torchserve_dag.runtime.compat.entry_point import as_bytes, decoded
from torchserve_dag.runtime.compat.rows import Row
from torchserve_dag.runtime.compat.wire import (
    WireRequest,
    WireResponse,
    read_requests,
    read_responses,
    write_requests,
    write_responses,
)
from torchserve_dag.runtime.data import codec, unzip
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.runtime.engine.runner import END, Chunk
from torchserve_dag.runtime.engine.streaming import UNPACED_BYTES
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.messages import Box, Failure, Label, Labels, Photo, Text
from torchserve_dag.runtime.models.handler_process import REFUSE_AFTER, HandlerProcess, HandlerSpec
from torchserve_dag.runtime.models.load import Loader
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.workflow import Workflow

DOES_WHAT_IT_IS_TOLD = """
    KEPT = {}
    def handle(data, context):
        if data is None:
            return None
        answers = []
        for index, row in enumerate(data):
            scope = {"row": row, "data": data, "context": context, "index": index, "KEPT": KEPT}
            exec(bytes(row["code" if "code" in row else "body"]).decode(), scope)
            answers.append(scope.get("answer"))
        return answers
"""
"""Runs the Python that it is sent: `answer` is what it answers."""


def spec_of(folder: Path, *, name: str = "m", handler: str = "handler.py", **settings: Any) -> HandlerSpec:
    defaults: dict[str, Any] = {
        "gives": bytes,
        "streams": False,
        "gpu": None,
        "batch": 4,
        "startup_s": 300.0,
        "limit_s": 300.0,
    }
    return HandlerSpec(name, f"{name}.mar", folder, handler, **(defaults | settings))


Start = Callable[..., HandlerProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the process of a handler with this code and these files, in a folder as TorchServe unpacks it."""
    started: list[HandlerProcess] = []

    def begin(
        code: str, files: Mapping[str, str | bytes] = {}, *, wait: bool = True, **settings: Any
    ) -> HandlerProcess:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        for name, content in {"handler.py": code, **files}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else textwrap.dedent(content).encode())
        started.append(HandlerProcess(spec_of(folder, **settings)))
        if wait:
            started[-1].wait()
        return started[-1]

    yield begin
    for one in started:
        one.close()
    for one in started:
        one.join()


def of_module(factory: pytest.TempPathFactory, code: str) -> Iterator[HandlerProcess]:
    """A process for several tests, which leave nothing behind in it."""
    folder = factory.mktemp("handler")
    (folder / "handler.py").write_text(textwrap.dedent(code))
    process = HandlerProcess(spec_of(folder))
    process.wait()
    yield process
    process.close()
    process.join()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HandlerProcess]:
    yield from of_module(tmp_path_factory, DOES_WHAT_IT_IS_TOLD)


class Answers:
    """Waits for the last answer of each item."""

    def __init__(self, items: int) -> None:
        self.of: list[list[Any]] = [[] for _ in range(items)]
        self._open = items
        self._changed = threading.Condition()

    def deliver(self, answers: Mapping[int, Any]) -> None:
        with self._changed:
            for place, answer in answers.items():
                self.of[place].append(answer)
                self._open -= not isinstance(answer, Chunk)
            self._changed.notify_all()

    def wait(self) -> list[list[Any]]:
        with self._changed:
            assert self._changed.wait_for(lambda: self._open <= 0, 120), self.of
        return self.of


def ask(process: HandlerProcess, *items: Any, gives: Any = bytes) -> list[Any]:
    """The items' answers, of one batch."""
    process.spec = replace(process.spec, gives=gives)
    answers = Answers(len(items))
    process([(f"id{i}", item) for i, item in enumerate(items)], answers.deliver)
    return [answer for (answer,) in answers.wait()]


def tell(process: HandlerProcess, code: str, gives: Any = Any) -> Any:
    """What a handler answers that does what it is told."""
    (answer,) = ask(process, textwrap.dedent(code).encode(), gives=gives)
    return answer


def until(true: Callable[[], Any], what: str = "it never happened") -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def bodies(*texts: bytes) -> list[Row]:
    return [Row({"body": text}) for text in texts]


# What a process has only once, and TorchServe gives to each handler.


def test_a_relative_path_is_a_file_of_the_archive(start: Start) -> None:
    code = """
        NAMES = open("names.txt").read()
        def handle(data, context):
            import os
            return data and [[NAMES, open("names.txt").read(), os.getcwd() == context.system_properties["model_dir"]]]
    """
    assert ask(start(code, {"names.txt": "a b"}), b"", gives=Any) == [["a b", "a b", True]]


def test_a_handler_loads_and_runs_in_the_main_thread(start: Start) -> None:
    code = """
        import asyncio, signal, sqlite3, threading
        HERE = threading.local()
        class Handler:
            def initialize(self, context):
                HERE.loaded_in = threading.current_thread().name
                self.loop = asyncio.get_event_loop()
                self.rows = sqlite3.connect(":memory:")
                self.rows.execute("CREATE TABLE seen (what TEXT)")
                signal.signal(signal.SIGALRM, lambda *_: HERE.alarms.append(1))
            def handle(self, data, context):
                HERE.alarms = []
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                signal.sigwait([]) if False else signal.pause()
                self.rows.execute("INSERT INTO seen VALUES ('it')")
                later = self.loop.run_until_complete(asyncio.sleep(0, "later"))
                same_loop = asyncio.get_event_loop() is self.loop
                return [[HERE.loaded_in, threading.current_thread() is threading.main_thread(), HERE.alarms,
                         self.rows.execute("SELECT * FROM seen").fetchall(), later, same_loop]]
    """
    assert ask(start(code), b"", gives=Any) == [["MainThread", True, [1], [["it"]], "later", True]]


CHANGED = [
    ("os.chdir('/')", "os.getcwd()"),
    ("os.environ['HELLO'] = 'you'", "os.environ.get('HELLO')"),
    ("locale.setlocale(locale.LC_ALL, 'C.UTF-8')", "locale.setlocale(locale.LC_ALL)"),
    ("random.seed(1)", "random.getstate()[1][:3]"),
    ("warnings.simplefilter('error')", "warnings.filters[0][0]"),
    ("logging.disable()", "logging.root.manager.disable"),
    ("sys.setrecursionlimit(7777)", "sys.getrecursionlimit()"),
    ("sys.path.insert(0, '/nowhere')", "sys.path[0]"),
    ("signal.signal(signal.SIGUSR1, signal.SIG_IGN)", "signal.getsignal(signal.SIGUSR1)"),
    ("socket.setdefaulttimeout(7)", "socket.getdefaulttimeout()"),
]


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HandlerProcess]:
    """Like `told`, for what changes a process."""
    yield from of_module(tmp_path_factory, DOES_WHAT_IT_IS_TOLD)


@pytest.mark.parametrize(("change", "look"), CHANGED, ids=[change for change, _ in CHANGED])
def test_a_default_that_a_handler_changes_is_its_own(spoilt: HandlerProcess, change: str, look: str) -> None:
    known = {module.__name__: module for module in (os, locale, random, warnings, logging, sys, signal, socket)}
    imports = f"import {', '.join(known)}"
    before = eval(look, known)  # noqa: S307 (an expression of this file)

    at_first, changed = (tell(spoilt, f"{imports}\n{now}\nanswer = repr({look})", bytes) for now in ("", change))

    assert tell(spoilt, f"{imports}\nanswer = repr({look})", bytes) == changed != at_first
    assert eval(look, known) == before  # noqa: S307


def test_torchs_defaults_are_a_handlers_own(start: Start) -> None:
    code = """
        import torch
        torch.set_grad_enabled(False)
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(5)
        def handle(data, context):
            return data and [[torch.is_grad_enabled(), torch.get_num_threads(), str(torch.get_default_dtype()),
                              torch.initial_seed()]]
    """

    def here() -> list[Any]:
        return [torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed()]

    before = here()
    assert ask(start(code), b"", gives=Any) == [[False, 3, "torch.float64", 5]]
    assert here() == before


def test_the_modules_are_the_archives_own(start: Start) -> None:
    """Also where they are imported late, by `importlib`, or by `pickle`; and also this package."""
    code = """
        import importlib, pickle
        from model import NAME
        def handle(data, context):
            from package import part
            late = importlib.import_module("late").NAME
            import torchserve_dag
            return data and [[NAME, part.NAME, late, type(pickle.loads(pickle.dumps(part.Thing()))).__module__, torchserve_dag.NAME]]
    """
    part = "NAME = 'part of {0}'\nclass Thing: ...\n"

    def files(of: str) -> dict[str, str]:
        names = {"model.py": "model", "late.py": "late", "torchserve_dag/__init__.py": "package"}
        own = {file: f"NAME = '{name} of {of}'" for file, name in names.items()}
        return own | {"package/__init__.py": "", "package/part.py": part.format(of)}

    processes = [start(code, files(of)) for of in ("one", "two")]

    for of, process in zip(("one", "two"), processes, strict=True):
        expected = [f"{name} of {of}" for name in ("model", "part", "late")]
        assert ask(process, b"", gives=Any) == [[*expected, "package.part", f"package of {of}"]]


def test_the_path_is_as_torchserve_makes_it(
    told: HandlerProcess, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    """The archive's files first, then what PYTHONPATH has, without the worker's own archive; for its children too."""
    root = str(Path(inspect.getfile(HandlerProcess)).parents[3])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, "/elsewhere"]))
    process = start(DOES_WHAT_IT_IS_TOLD)

    path, inherited = tell(process, "import os, sys; answer = [sys.path, os.environ['PYTHONPATH']]")

    assert path[:2] == [str(process.spec.folder), "/elsewhere"]
    assert inherited == os.pathsep.join(path[:2])


def test_a_process_has_none_of_the_workers_descriptors(told: HandlerProcess) -> None:
    """Its socket and its output are all: a connection of the worker's stays open no longer than the worker."""
    opened = {str(Path(entry.path).readlink()) for entry in os.scandir(f"/proc/{told.pid}/fd")}

    assert sorted(what.partition(":")[0] for what in opened if ":" in what) == ["pipe", "socket"]


# Loading.


def test_the_context_has_what_the_manifest_and_the_settings_say(start: Start) -> None:
    code = """
        class Handler:
            def initialize(self, context):
                self.seen = [context.model_name, context.manifest["model"]["modelName"], context.model_yaml_config]
                self.seen += [context.system_properties[key] for key in ("gpu_id", "batch_size", "server_version")]
            def handle(self, data, context):
                return [self.seen]
    """
    manifest = json.dumps({"model": {"modelName": "its name", "handler": "handler.py", "configFile": "settings.yaml"}})
    files = {"MAR-INF/MANIFEST.json": manifest, "settings.yaml": "handler: {top: 3}\n"}

    (seen,) = ask(start(code, files, gpu=1, batch=7), b"", gives=Any)

    assert seen == ["m", "its name", {"handler": {"top": 3}}, 1, 7, "0.12.0"]


@pytest.mark.parametrize(
    ("handler", "expected"), [("handler.py:serve", b"served"), ("handler", b"handled"), ("a/handler.py", b"handled")]
)
def test_a_manifest_may_name_a_function(start: Start, handler: str, expected: bytes) -> None:
    code = """
        def serve(data, context): return data and ["served"]
        def handle(data, context): return data and ["handled"]
    """
    assert ask(start(code, handler=handler), b"") == [expected]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("class A: ...\nclass B: ...", "m.mar: handler.py has neither a function handle nor exactly one class"),
        ("import no_such_package", "m.mar: loading it raised ModuleNotFoundError: No module named 'no_such_package'"),
        ("def handle(data, context): return [len(data)]", "m.mar: loading it raised TypeError: "),
        ("async def handle(data, context): return data", "m.mar: handle is a coroutine"),
        (
            "class A:\n def initialize(self, c): raise RuntimeError('no weights')\n def handle(self, d, c): ...",
            "m.mar: no weights",
        ),
        ("import os; os._exit(3)", "m.mar: its process ended (status 3)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "m.mar: its process ended (Segmentation fault)"),
        ("raise SystemExit(2)", "m.mar: loading it raised SystemExit: 2"),
    ],
)
def test_a_handler_that_cannot_be_loaded_is_refused_with_the_reason(start: Start, code: str, why: str) -> None:
    process = start(code, wait=False)
    with pytest.raises(RuntimeError) as caught:
        process.wait()

    assert str(caught.value).startswith(why)


def test_a_handler_that_loads_for_too_long_is_refused(start: Start) -> None:
    process = start("import time; time.sleep(600)", wait=False, startup_s=0.2)
    with pytest.raises(RuntimeError, match=r"m\.mar: it was not loaded within 0\.2 s, so its process was ended"):
        process.wait()

    assert not psutil.pid_exists(process.pid or 0)


def test_an_archive_may_name_a_handler_that_torchserve_does_not_have(start: Start) -> None:
    process = start("", handler="nonesuch.py", wait=False)
    with pytest.raises(RuntimeError, match=r"m\.mar: it holds no nonesuch\.py, and TorchServe has no handler of that"):
        process.wait()


def test_processes_load_at_the_same_time(write: Write, mar: Mar) -> None:
    """Each of these waits until the other loads."""
    code = """
        import pathlib, time
        def handle(data, context):
            if data is None:
                here = pathlib.Path("{here}")
                here.touch()
                while len(list(here.parent.iterdir())) < 2:
                    time.sleep(0.01)
            return data and ["x"]
    """
    both = Path(tempfile.mkdtemp())
    for name in ("one", "two"):
        mar(name, code.replace("{here}", str(both / name)))
    path = write(
        """
        first: {torchserve: {archive: one.mar, takes: Text, gives: Text}}
        answer: {torchserve: {archive: two.mar, takes: Text, gives: Text}, input: first}
        """
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"a"]) == [Text("x")]


def test_one_handler_that_cannot_be_loaded_ends_the_others(write: Write, mar: Mar) -> None:
    mar("well", "def handle(data, context): return data and ['x']")
    mar("ill", "raise RuntimeError('no weights')")
    path = write(
        """
        first: {torchserve: {archive: well.mar, takes: Text, gives: Text}}
        answer: {torchserve: {archive: ill.mar, takes: Text, gives: Text}, input: first}
        """
    )
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(RuntimeError, match=r"ill\.mar: no weights"):
        Workflow.load(path)

    assert {child.pid for child in psutil.Process().children()} <= before


@pytest.mark.parametrize(
    ("device", "given", "gpu"), [(None, 1, 1), (None, None, 0), ("cpu", 1, None), ("cuda:1", None, 1)]
)
def test_a_handler_gets_the_gpu_that_any_node_gets(
    write: Write,
    mar: Mar,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str | None,
    given: int | None,
    gpu: int | None,
) -> None:
    """As a number, which is what TorchServe gives it; None is the CPU."""
    mar("m", DOES_WHAT_IT_IS_TOLD)
    code = read_graph(Project(project), write("answer: {torchserve: {archive: m.mar, takes: Text}}")).codes["answer"]
    loader = Loader(Project(project), device, given, 1)

    def number() -> int | None:
        spec, folder = loader._process(code, code.kind, 1, 1)
        assert folder
        folder.cleanup()
        return spec.gpu

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert number() == gpu
    if device != "cuda:1":
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        assert number() is None


# Archives.


def test_an_archive_is_unpacked_for_one_process_or_once_for_all_workers(tmp_path: Path) -> None:
    archive = tmp_path / "m.mar"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": {"handler": "handler.py"}}))
    (tmp_path / ".m.mar.part").mkdir()
    (tmp_path / ".m.mar.part" / "half").touch()

    own, owner = archives.unpacked(archive, None)
    shared, nobody = archives.unpacked(archive, tmp_path)

    assert owner is not None
    assert own.is_dir()
    owner.cleanup()
    assert not own.exists()
    assert (shared, nobody) == (tmp_path / ".m.mar", None)
    assert archives.unpacked(archive, tmp_path) == (shared, None)
    assert archives.unpacked(shared, None) == (shared, None)
    assert [path.name for path in shared.iterdir()] == ["MAR-INF"]
    assert archives.handler_of(archive) == archives.handler_of(shared) == "handler.py"
    assert archives.handler_of(tmp_path) is None


def test_an_archive_that_only_unpacks_to_much_costs_little(tmp_path: Path) -> None:
    """A megabyte of an archive may hold a gigabyte of blanks."""
    large = b"send_intermediate_predict_response()" + b" " * unzip.MAX_FILE
    manifest = json.dumps({"model": {"handler": "handler.py"}}).encode()
    for name, files in {"a": (manifest + large, b""), "b": (manifest, large)}.items():
        with zipfile.ZipFile(tmp_path / f"{name}.mar", "w", zipfile.ZIP_DEFLATED) as packed:
            for path, content in zip(("MAR-INF/MANIFEST.json", "handler.py"), files, strict=True):
                packed.writestr(path, content)
        with zipfile.ZipFile(tmp_path / f"{name}.mar") as packed:
            packed.extractall(tmp_path / name)
        for archive in (tmp_path / f"{name}.mar", tmp_path / name):
            assert archives.handler_of(archive) == (None if name == "a" else "handler.py")
            assert not archives.streams(archive)


def test_a_file_that_is_no_archive_is_named_by_check(write: Write, project: Path) -> None:
    (project / "model_store").mkdir()
    (project / "model_store" / "junk.mar").write_bytes(b"junk")
    path = write("answer: {torchserve: {archive: junk.mar, takes: Text, gives: Text}}")
    with pytest.raises(CheckError) as caught:
        read_graph(Project(project), path)

    (problem,) = caught.value.problems
    assert (problem.line, problem.what) == (
        5,
        f"answer: {project}/model_store/junk.mar is not an archive of torch-model-archiver's",
    )


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from ts.handler_utils.utils import send_intermediate_predict_response as send\nsend()", False),
        ("from ts.handler_utils.utils import send_intermediate_predict_response\n", False),
        ("def handle(d, c):\n send_intermediate_predict_response(['a'], {}, '', 200, c)\n", True),
        ("def handle(d, c):\n utils.send_intermediate_predict_response(['a'], {}, '', 200, c)\n", True),
        ("# send_intermediate_predict_response()\n", False),
        ("send_intermediate_predict_response(", False),
    ],
)
def test_a_handler_that_streams_is_known_by_its_code(tmp_path: Path, code: str, *, expected: bool) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "handler.py").write_text(code)
    (tmp_path / "torchserve_dag").mkdir()
    (tmp_path / "torchserve_dag" / "ours.py").write_text("send_intermediate_predict_response()")

    assert archives.streams(tmp_path) is expected


# Rows and messages in.


@dataclass(frozen=True)
class Found:
    text: str
    size: int


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"abc", ["bytearray", "bytearray(b'abc')"]),
        (Text("gr\u00fc\u00df"), ["bytearray", repr(bytearray("gr\u00fc\u00df".encode()))]),
        ("t\u00e9xt", ["str", "'t\u00e9xt'"]),
        (Found("a", 1), ["dict", "{'text': 'a', 'size': 1}"]),
        (Labels([Label("a", 0.5)]), ["dict", "{'labels': [{'name': 'a', 'score': 0.5}]}"]),
        ([Found("a", 1)], ["list", "[{'text': 'a', 'size': 1}]"]),
        (None, ["NoneType", "None"]),
        (2.5, ["float", "2.5"]),
    ],
)
def test_a_message_is_handed_over_as_torchserve_would_have_it(
    told: HandlerProcess, message: Any, expected: list[str]
) -> None:
    code = b"answer = [type(row['body']).__name__, repr(row['body'])]"

    assert ask(told, Row({"code": code, "body": message}), gives=Any) == [expected]


def test_a_photo_is_handed_over_as_the_file_that_came_where_that_is_still_the_photo(told: HandlerProcess) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (10, 20, 30)).save(buffer, "PNG")
    photo = codec.decode(Photo, buffer.getvalue())
    code = b"answer = bytes(row['photo'])"

    came, cropped = ask(told, *(Row({"code": code, "photo": one}) for one in (photo, photo.crop(Box(0, 0, 2, 2)))))

    assert came == buffer.getvalue()
    with Image.open(io.BytesIO(cropped)) as image:
        assert (image.format, image.mode, image.size, image.getpixel((1, 1))) == ("BMP", "RGB", (2, 2), (10, 20, 30))


def test_what_cannot_be_written_fails_its_item_alone(told: HandlerProcess, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = ask(told, [object()], b"answer = 'well'")

    assert bad == Failure(500, "The input of m cannot be written.", "HandlerError", "m")
    assert good == b"well"


@pytest.mark.parametrize("media", ["application/json", "application/json5", "text/plain", "text/csv", "image/png", ""])
@pytest.mark.parametrize("body", [b'{"a": [1]}', b'{"a": ', "gr\u00fc\u00df".encode(), b"\xff"])
def test_a_request_is_decoded_as_torchserves_worker_does(media: str, body: bytes) -> None:
    from ts.protocol.otf_message_handler import _retrieve_input_data

    sent = b"".join(len(part).to_bytes(4, "big") + part for part in (b"data", media.encode(), body))
    connection, worker = socket.socketpair()
    with connection, worker:
        connection.sendall(sent)
        theirs = _retrieve_input_data(worker)["value"]

    ours = decoded(body, {"content-type": media})

    assert ours == theirs
    assert type(ours) is type(theirs)


def test_requests_and_responses_are_read_as_they_were_written() -> None:
    headers = {"X-One": "\u00fc", "body": {"content-type": "a/b"}, "more": {"content-type": ""}}
    requests = [WireRequest("1", {"body": b"\0", "more": b""}, headers), WireRequest("2", {}, {})]
    responses = [WireResponse("1", 418, "teapot", "a/b", {}, b"\xff"), WireResponse("2")]

    assert read_requests(bytearray(write_requests(requests)))[0] == requests
    assert read_responses(bytearray(write_responses(responses, 500, "\u00fc"))) == (500, "\u00fc", responses)


def test_a_handler_sees_its_own_rows_headers_and_the_requests_ids(told: HandlerProcess) -> None:
    code = b"""answer = [
        context.get_request_header(index, "X-One"), context.get_all_request_header(index)["code"],
        context.get_request_id(index), context.request_ids[index], context.get_sequence_id(index)]"""
    rows = [
        Row({"code": code}, {"X-One": "1", "ts_request_sequence_id": "s"}),
        Row({"code": code}, {"code": {"content-type": "a/b"}}),
    ]

    assert ask(told, *rows, gives=Any) == [
        ["1", {"content-type": ""}, "id0", "id0", "s"],
        [None, {"content-type": "a/b"}, "id1", "id1", None],
    ]
    assert Row.received({}, {"explain": "False", "describe": "x", "X-One": "1"}).headers == {"X-One": "1"}


def test_elements_of_one_request_have_ids_of_their_own(told: HandlerProcess) -> None:
    told.spec = replace(told.spec, gives=bytes)
    answers = Answers(3)
    told([("id", b"answer = context.get_request_id(index)")] * 3, answers.deliver)

    assert answers.wait() == [[b"id"], [b"id-1"], [b"id-2"]]


# Answers out.


@pytest.mark.parametrize(
    ("answer", "gives", "expected"),
    [
        ("{'a': 1}", Any, {"a": 1}),
        ("'no JSON'", Any, b"no JSON"),
        ("b''", Any, b""),
        ("b''", bytes, b""),
        ("bytearray(b'a')", bytes, b"a"),
        ("'plain'", Text, Text("plain")),
        ("{'text': 'ours'}", Text, Text("ours")),
        ("'plain'", str, "plain"),
        ("'gr\u00fc\u00df'", str, "gr\u00fc\u00df"),
        ("'17'", str, "17"),
        ("''", str, ""),
        ("'{}'", str, "{}"),
        ("b'bytes'", str, "bytes"),
        ("{'tabby': 0.5}", dict[str, float], {"tabby": 0.5}),
        ("[{'name': 'a', 'score': 1}]", list[Label], [Label("a", 1.0)]),
        ("0.5", float, 0.5),
        ("True", bool, True),
        ("None", Any, None),
    ],
)
def test_an_answer_becomes_the_type_that_is_declared(
    told: HandlerProcess, answer: str, gives: Any, expected: Any
) -> None:
    assert tell(told, f"answer = {answer}", gives) == expected


def test_an_answer_of_another_type_is_the_handlers_failure(told: HandlerProcess) -> None:
    """And not its client's: a 4xx would say that the request has to be mended."""
    failure = tell(told, "answer = 'text'", Labels)

    assert (failure.status, failure.type, failure.node) == (500, "HandlerError", "m")
    assert failure.message.startswith("m did not answer with JSON with the keys labels.")


@dataclass(frozen=True)
class Odd:
    text: str

    def __post_init__(self) -> None:
        raise KeyError(self.text)


def test_an_answer_that_its_type_raises_at_costs_the_process_nothing(told: HandlerProcess) -> None:
    pid = told.pid

    assert tell(told, "answer = {'text': 'a'}", Odd).message == "The answer of m cannot be read."
    assert tell(told, "import os; answer = os.getpid()") == pid


def test_an_answer_is_encoded_as_torchserve_does() -> None:
    from ts.context import Context as Theirs
    from ts.protocol.otf_message_handler import create_predict_response

    context = Theirs("m", "", {}, 1, None, "")
    for answer in (b"\x00", bytearray(b"a"), "\u00fc", {"a": 1}, [1, None], 3, True, torch.arange(3.0)):
        context.request_processor = [RequestProcessor({})]
        message = create_predict_response([answer], {0: "id"}, "ok", 200, context=context)

        assert bytes(message).removesuffix(b"\xff\xff\xff\xff").endswith(as_bytes(answer))


def test_a_status_that_a_handler_sets_is_the_answer_of_that_row(told: HandlerProcess) -> None:
    odd = b"context.set_response_status(code=418, phrase='teapot', idx=index); answer = 'short and stout'"

    assert ask(told, b"answer = 'short'", odd) == [b"short", Failure(418, "short and stout", "HandlerError", "m")]
    assert ask(told, b"answer = 'short'", b"answer = 'stout'") == [b"short", b"stout"]


def test_a_failure_of_an_archive_of_ours_is_that_failure(told: HandlerProcess) -> None:
    code = """
        context.set_response_status(422, idx=index)
        answer = {"code": 422, "type": "InputError", "message": "Too odd.", "node": "inner"}
    """
    assert tell(told, code) == Failure(422, "Too odd.", "InputError", "m")


def test_rows_that_fail_together_are_tried_alone(told: HandlerProcess, capfd: pytest.CaptureFixture[str]) -> None:
    answers = ask(told, b"answer = 'a'", b"raise KeyError('secret')", b"answer = 'c'")

    assert answers == [b"a", Failure(500, "m failed.", "HandlerError", "m"), b"c"]
    until(lambda: "secret" in capfd.readouterr().err)


def test_an_answer_that_cannot_be_written_is_a_failure_of_its_row_alone(told: HandlerProcess) -> None:
    bad, good = ask(told, b"answer = object()", b"answer = 'well'")

    assert bad == Failure(500, "m gave an answer that cannot be written: object.", "HandlerError", "m")
    assert good == b"well"


def test_an_answer_that_is_no_list_as_long_as_the_batch_is_a_failure(start: Start) -> None:
    process = start("def handle(data, context): return None if data is None else eval(bytes(data[0]['body']))")

    for answer in (b"'text'", b"None", b"{}", b"[]", b"[1, 2]"):
        what = "m must answer with a list as long as its batch, 1."
        assert ask(process, answer) == [Failure(500, what, "HandlerError", "m")]


def test_a_handler_that_answers_only_the_first_row_is_asked_row_by_row(start: Start) -> None:
    """Many a handler reads `data[0]` and answers with a list of one."""
    process = start("def handle(data, context): return data and [bytes(data[0]['body'])]")

    assert ask(process, b"a", b"b", b"c") == [b"a", b"b", b"c"]


def test_the_row_that_is_tried_again_is_whole(told: HandlerProcess) -> None:
    """A handler may change what it is given."""
    code = b"seen = row.pop('body'); seen['a'].append(1); answer = seen if len(data) == 1 else [][0]"

    assert ask(told, *[Row({"code": code, "body": {"a": []}})] * 2, gives=Any) == [{"a": [1]}] * 2


def test_a_prediction_exception_says_its_status_and_message(told: HandlerProcess) -> None:
    raising = "from ts.utils.util import PredictionException as Odd; raise Odd('Too odd.', {0})"
    odd, large, exits = ask(told, raising.format(422).encode(), b"raise MemoryError", b"raise SystemExit(1)")

    assert odd == Failure(422, "Too odd.", "HandlerError", "m")
    assert large == Failure(507, "m ran out of memory.", "HandlerError", "m")
    assert exits == Failure(500, "m failed.", "HandlerError", "m")
    assert tell(told, raising.format(200)).status == 500


def test_every_kind_of_metric_may_be_added(told: HandlerProcess) -> None:
    code = """
        context.metrics.add_metric_to_cache("n", "count").add_or_update(1)
        context.metrics.add_counter("a", 1, 0)
        context.metrics.add_time("b", 2.5, None, "ms")
        context.metrics.add_size("c", 1)
        context.metrics.add_percent("d", 1)
        context.metrics.add_error("e", "f")
        context.metrics.get_metric("a").add_or_update(1, [])
        answer = "counted"
    """
    assert tell(told, code, str) == "counted"


def test_the_context_has_what_torchserves_has() -> None:
    from ts.context import Context as Theirs
    from ts.context import RequestProcessor as TheirProcessor

    theirs, ours = Theirs("m", "", {}, 1, None, "0.12.0", model_yaml_config={}), Context("m", Path(), None, 1)

    assert _public(theirs) <= _public(ours)
    assert _public(TheirProcessor({})) == _public(RequestProcessor({}))
    assert theirs.system_properties.keys() == ours.system_properties.keys()
    for name in _public(TheirProcessor({})):
        assert _parameters(TheirProcessor, name) == _parameters(RequestProcessor, name)
    for name in _public(theirs) & _public(Theirs):
        if callable(getattr(Theirs, name)):
            assert _parameters(Theirs, name) == _parameters(Context, name)


def _public(one: object) -> set[str]:
    return {name for name in dir(one) if not name.startswith("_")}


def _parameters(kind: type, name: str) -> list[str]:
    return list(inspect.signature(getattr(kind, name)).parameters)


# Chunks.

STREAMS = """
    from ts.handler_utils.utils import send_intermediate_predict_response
    def handle(data, context):
        if data is None: return None
        words = [bytes(row["body"]).decode().split() for row in data]
        for some in list(zip(*words))[:-1]:
            send_intermediate_predict_response(list(some), context.request_ids, "Intermediate", 200, context)
        if words[0][-1] == "raises": raise RuntimeError
        return [row[-1] if row[-1] != "nothing" else "" for row in words]
"""


@pytest.fixture(scope="module")
def streaming(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HandlerProcess]:
    yield from of_module(tmp_path_factory, STREAMS)


def test_a_handler_that_streams_gives_its_chunks_as_they_come(streaming: HandlerProcess) -> None:
    streaming.spec, answers = replace(streaming.spec, streams=True, gives=Text), Answers(2)
    streaming([("a", b"one two three"), ("b", b"1 2 nothing")], answers.deliver)

    assert answers.wait() == [
        [Chunk(Text("one")), Chunk(Text("two")), Chunk(Text("three")), END],
        [Chunk(Text("1")), Chunk(Text("2")), END],
    ]

    failed = Answers(2)  # a batch that has begun is not tried again
    streaming([("a", b"one raises"), ("b", b"1 2")], failed.deliver)
    failure = Failure(500, "m failed.", "HandlerError", "m")
    assert failed.wait() == [[Chunk(Text("one")), failure], [Chunk(Text("1")), failure]]


def test_chunks_of_an_answer_that_is_declared_to_be_whole_are_put_together(streaming: HandlerProcess) -> None:
    streaming.spec = replace(streaming.spec, streams=False)

    assert ask(streaming, b"one two three") == [b"onetwothree"]


def test_a_workflow_streams_what_an_unedited_handler_sends(write: Write, mar: Mar) -> None:
    gate = Path(tempfile.mkdtemp()) / "gate"
    mar(
        "tells",
        STREAMS.replace("if words[0][-1]", "wait()\n        if words[0][-1]")
        + f"""
    def wait():
        import os, time
        while not os.path.exists("{gate}"): time.sleep(0.01)
    """,
    )
    path = write(
        """
        tell: {torchserve: {archive: tells.mar, takes: Text, gives: Text}}
        answer: {function: shout, each: tell}
        """,
        "def shout(text: Text) -> str: return text.text.upper()",
    )
    came: list[Any] = []
    with Workflow.load(path) as workflow:
        assert workflow.graph.streams
        running = workflow.submit(b"one two three", on_chunk=came.append)
        until(lambda: came == ["ONE", "TWO"])
        gate.touch()

        assert running.future.result(60) == []
        assert came == ["ONE", "TWO", "THREE"]
        assert workflow([b"a b", b"c"]) == [["A", "B"], ["C"]]


def test_a_process_is_not_held_back_so_a_client_that_leaves_too_much_is_cancelled(write: Write, mar: Mar) -> None:
    """A process has other requests too, and is ended if it takes too long."""
    mar("tells", STREAMS)
    path = write("answer: {torchserve: {archive: tells.mar, takes: Text, gives: Text}}")
    with Workflow.load(path) as workflow:
        left = workflow.engine.submit(b"w " * 40, on_chunk=lambda *_: UNPACED_BYTES // 32)
        failure = left.future.result(60)

        assert (failure.status, failure.type) == (499, "Cancelled")
        assert workflow([b"a b"]) == [[Text("a"), Text("b")]]


# What a process prints.


def test_no_line_of_a_handlers_is_torchserves_to_obey(told: HandlerProcess, capfd: pytest.CaptureFixture[str]) -> None:
    """Java ends a line at more than a line feed. TorchServe reads metrics and process ids from its workers' lines."""
    seen = ""

    def printed() -> bool:
        nonlocal seen
        seen += capfd.readouterr().err
        return "the end" in seen

    tell(
        told,
        """
        import os, sys
        print("[METRICS]Own.Count:1|#a:b", "one", "two\\r[METRICS]x\\u2028[PID]1", "[PID]2", sep="\\n")
        os.write(2, b"[METRICS]from C\\n" + b"x" * 20000 + b"\\nthe end\\n")
    """,
    )
    until(printed)

    lines = [line for line in seen.splitlines() if "x" not in line]
    assert lines == ["m: one", "m: two", "m: the end"]
    assert all(line.startswith("m: ") for line in seen.splitlines())


# A process that ends, and one that does not.

FRAGILE = """
    import os, signal, time
    def handle(data, context):
        if data is None: return None
        for row in data:
            body = bytes(row["body"])
            if body == b"die": os.kill(os.getpid(), signal.SIGSEGV)
            if body == b"hang": time.sleep(600)
            if body == b"loop": exec("while True: pass")
        return [str(os.getpid())] * len(data)
"""


def test_a_batch_whose_process_ends_fails_and_the_next_is_answered(start: Start) -> None:
    process = start(FRAGILE)
    (first,) = ask(process, b"a")

    died = ask(process, b"b", b"die")
    (after,) = ask(process, b"c")

    what = "m: its process ended (Segmentation fault) while it had this request; another is being started. Try again."
    assert died == [Failure(507, what, "WorkerDied", "m")] * 2
    assert int(after) == process.pid != int(first)


def test_a_process_that_is_killed_between_two_batches_costs_nothing(start: Start) -> None:
    process = start(FRAGILE)
    (first,) = ask(process, b"a")
    os.kill(int(first), signal.SIGKILL)
    until(lambda: not alive(int(first)))

    assert int(ask(process, b"b")[0]) != int(first)


@pytest.mark.parametrize("body", [b"hang", b"loop"])
def test_a_batch_that_takes_too_long_ends_its_process_alone(start: Start, body: bytes) -> None:
    process = start(FRAGILE)
    pid = process.pid
    process.spec = replace(process.spec, limit_s=0.3)

    (slow,) = ask(process, body)
    process.spec = replace(process.spec, limit_s=300)

    what = "m took longer than 0.3 s: its process was ended, and another is being started."
    assert slow == Failure(504, what, "Timeout", "m")
    assert int(ask(process, b"a")[0]) != pid


def test_a_process_that_cannot_be_started_again_is_refused_with_the_reason(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchserve_dag.runtime.models.handler_process.PAUSES_S", (0,))
    code = """
        import os
        if os.path.exists("gone"): raise RuntimeError("the weights are gone")
    """
    process = start(textwrap.dedent(code) + textwrap.dedent(FRAGILE))
    (process.spec.folder / "gone").touch()
    assert ask(process, b"die")[0].status == 507

    answers = ask(process, b"a")

    assert answers == [Failure(503, answers[0].message, "HandlerUnavailable", "m")]
    assert answers[0].message.startswith("m does not run: the weights are gone, ")
    assert int(answers[0].message.split(", ")[1].split()[0]) >= REFUSE_AFTER
    (process.spec.folder / "gone").unlink()

    def serves() -> bool:
        return isinstance(ask(process, b"a")[0], bytes)

    until(serves)


def test_neighbours_are_not_harmed(write: Write, mar: Mar) -> None:
    mar("fragile", FRAGILE)
    path = write(
        """
        split: {function: split}
        each: {torchserve: {archive: fragile.mar, takes: bytes, gives: Text}, each: split, on_error: skip}
        other: {function: other}
        answer: {function: answer, inputs: {each: each, other: other}}
        """.replace("each: {torch", "fragile: {torch").replace("{each: each,", "{each: fragile,"),
        """
        def split(text: Text) -> list[bytes]: return [word.encode() for word in text.text.split()]
        def other(text: Text) -> int: return len(text.text)
        def answer(each: list[Text | Skipped], other: int) -> str:
            return " ".join("-" if isinstance(one, Skipped) else "ok" for one in each) + f" {other}"
        """,
    )
    with Workflow.load(path) as workflow:
        assert workflow([Text("a die b"), Text("c")]) == ["ok - ok 7", "ok 1"]
        assert not workflow.hangs()


def test_a_process_that_hangs_does_not_end_the_worker(write: Write, mar: Mar) -> None:
    mar("fragile", FRAGILE)
    path = write("answer: {torchserve: {archive: fragile.mar, takes: bytes, gives: Text}, timeout_s: 0.5}")
    with Workflow.load(path) as workflow:
        (hung,) = workflow([b"hang"])
        until(lambda: isinstance(workflow([b"a"])[0], Text))

        assert hung.status == 504
        assert not workflow.hangs()


def test_a_closed_process_is_gone_with_its_children_and_its_folder(start: Start, tmp_path: Path) -> None:
    owned = tempfile.TemporaryDirectory(dir=tmp_path)
    (Path(owned.name) / "handler.py").write_text(textwrap.dedent(DOES_WHAT_IT_IS_TOLD))
    process = HandlerProcess(spec_of(Path(owned.name)), owned)
    process.wait()
    pids = [process.pid, int(tell(process, "import subprocess; answer = subprocess.Popen(['sleep', '600']).pid", str))]
    waiting = Answers(1)
    process([("id", b"import time; time.sleep(600)")], waiting.deliver)

    process.close()
    process.close()
    process.join()

    closing = Failure(503, "m is closing.", "HandlerUnavailable", "m")
    assert waiting.wait() == [[closing]]
    assert ask(process, b"answer = 1") == [closing]
    assert not Path(owned.name).exists()
    until(lambda: not any(map(alive, pids)))


def alive(pid: int | None) -> bool:
    return psutil.pid_exists(pid or 0) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_processes_end_with_their_worker_however_that_ends(tmp_path: Path) -> None:
    """Also one that computes, and does not read its socket."""
    (tmp_path / "handler.py").write_text(textwrap.dedent(DOES_WHAT_IT_IS_TOLD))
    program = f"""
import time
from pathlib import Path
from torchserve_dag.runtime.models.load import Loader
from torchserve_dag.runtime.models.handler_process import HandlerProcess, HandlerSpec
spec = HandlerSpec("m", "m.mar", Path({str(tmp_path)!r}), "handler.py", bytes, False, None, 1, 300, 300)
for busy in (b"", b"exec('while True: pass')", b"import time; time.sleep(600)"):
    process = HandlerProcess(spec)
    process.wait()
    process([("id", busy)], lambda _: None)
    print(process.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout
        pids = [int(worker.stdout.readline()) for _ in range(3)]
        assert all(map(alive, pids))
        worker.kill()

    until(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize("mode", ["batched", "asynchronous"])
def test_in_torchserves_own_worker_a_process_outlives_no_worker(
    project: Path, write: Write, mar: Mar, mode: str
) -> None:
    """In asynchronous mode a guard starts the process that computes, and another when it ends."""
    mar("fragile", FRAGILE)
    more = f"serve: {{mode: {mode}}}"
    write("answer: {torchserve: {archive: fragile.mar, takes: bytes, gives: Text}}", more=more)
    (built,) = build(Project(project), ["flow"]).built
    folder = project / "unpacked"
    with zipfile.ZipFile(built.path) as archive:
        archive.extractall(folder)
    with worker(folder, mode) as (program, front):

        def text_of(name: str, body: bytes) -> str:
            front.ask(name, body)
            return str((front.answer(name) if mode == "asynchronous" else front.part(name)).json.get("text"))

        first = int(text_of("1", b"a"))
        front.ask("2", b"die")
        died = front.answer("2") if mode == "asynchronous" else front.part("2")
        second = int(text_of("3", b"b"))
        assert (died.status, died.json["node"], alive(first)) == (507, "answer", False)
        assert sorted(path.name for path in folder.glob(".fragile*")) == [".fragile.mar", ".fragile.mar.lock"]
        computes = psutil.Process(second).parent()
        assert computes
        assert (computes.pid == program.pid) == (mode == "batched")
        computes.kill()

        until(lambda: not alive(second))
        if mode == "asynchronous":
            names = map(str, itertools.count(4))  # the guard may not know yet: then a request is answered 507
            third = int(next(text for name in names if (text := text_of(name, b"c")) != "None"))
            assert third not in {first, second}
            until(lambda: alive(third))

    until(lambda: not any(str(folder) in path_of(one) for one in psutil.process_iter()))


def path_of(process: psutil.Process) -> str:
    try:
        return process.environ().get("PYTHONPATH", "") if alive(process.pid) else ""
    except psutil.Error:
        return ""


@contextmanager
def worker(folder: Path, mode: str) -> Iterator[tuple[subprocess.Popen[bytes], FrontEnd]]:
    """TorchServe's own worker program with an unpacked archive, as TorchServe's front end starts it."""
    ts = Path(inspect.getfile(importlib.import_module("ts"))).parent
    address = f"{tempfile.mkdtemp()}/worker.9000"
    command = [sys.executable, str(ts / "model_service_worker.py"), "--sock-type", "unix", "--sock-name", address]
    command += [
        "--metrics-config",
        str(ts / "configs" / "metrics.yaml"),
        *(["--async"] if mode == "asynchronous" else []),
    ]
    with (
        subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}) as program,
        socket.socket(socket.AF_UNIX) as connection,
    ):
        until(lambda: connection.connect_ex(address) == 0)
        manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_bytes())
        sized = [
            len(text).to_bytes(4, "big") + text
            for text in (b"flow", str(folder).encode(), manifest["model"]["handler"].encode(), b"")
        ]
        connection.sendall(
            b"L" + sized[0] + sized[1] + (1).to_bytes(4, "big") + sized[2] + b"\xff" * 4 + sized[3] + b"\1"
        )
        loaded = connection.recv(1 << 16)
        assert loaded[:4] == (200).to_bytes(4, "big"), loaded
        front = FrontEnd(connection)
        try:
            yield program, front
        finally:
            front.close()
            program.kill()
