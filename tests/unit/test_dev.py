"""`torchserve-dag dev`, and the direct host through it: a project's folder behind HTTP, without a server between."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from torchserve_dag.dev.loader import DevLoader
from torchserve_dag.direct.entrance import Entrance, InFlight
from torchserve_dag.direct.forms import MAX_PARTS, FormError, parts_of
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.worker.protocol import PendingResponse, ServiceRequest, ServiceResponse

WITHIN_S = 60

CODE = """
import time
from collections.abc import Iterator
from pathlib import Path
from torchserve_dag import Text

def wait_for(path):
    end = time.monotonic() + 60
    while not Path(path).exists() and time.monotonic() < end:
        time.sleep(0.01)

def shout(text: Text, parameters: dict[str, str]) -> str:
    return text.text.upper() + parameters.get("mark", "")

def first(text: Text) -> Text:
    if text.text.startswith("gate "):
        gate = text.text.removeprefix("gate ")
        Path(gate + ".begun").touch()
        wait_for(gate)
    return text

def second(text: Text) -> str:
    if text.text.startswith("gate "):
        Path(text.text.removeprefix("gate ") + ".second").touch()
    return text.text.upper()

def words(text: Text) -> Iterator[Text]:
    if text.text.startswith("fill "):
        told = Path(text.text.removeprefix("fill "))
        for i in range(2000):
            told.write_text(str(i))
            yield Text("x" * 2**20)
        return
    if text.text.startswith("number "):
        told = Path(text.text.removeprefix("number "))
        for i in range(60):
            told.write_text(str(i + 1))
            yield Text(f"{i:07d}," * 2**17)
        return
    for word in text.text.split():
        if word.startswith("/"):
            wait_for(word)
        yield Text(word)
"""

WORKFLOW = """
name: {name}
version: "{version}"
does: A test.
code: steps.py
nodes:
{nodes}
output: {output}
serve: {{timeout_s: 90}}
"""

NODES = {
    "shout": "  shout: {function: shout, inputs: {text: request, parameters: parameters}}",
    "steps": "  first: {function: first, inputs: {text: request}}\n  second: {function: second, inputs: {text: first}}",
    "words": "  words: {function: words, inputs: {text: request}}",
}


def write_workflow(root: Path, name: str, version: str = "1.0", nodes: str = "", code: str = "steps.py") -> Path:
    nodes = nodes or NODES[name]
    output = nodes.rsplit("\n", 1)[-1].strip().partition(":")[0]
    path = root / "workflows" / f"{name}-{version}.yaml"
    text = WORKFLOW.format(name=name, version=version, nodes=nodes, output=output).replace("steps.py", code)
    path.write_text(text)
    return path


class Dev:
    """The command, running."""

    def __init__(self, root: Path, *names: str) -> None:
        self.root, self.said = root, ""
        command = [sys.executable, "-m", "torchserve_dag", "dev", *names, "--port", "0", "--project", str(root)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "COLUMNS": "300"}
        )
        threading.Thread(target=self._read, daemon=True).start()
        self.wait_for("loaded in")
        self.address = re.findall(r"http://127\.0\.0\.1:\d+", self.said)[0]

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.said += line

    def wait_for(self, what: str | Callable[[], Any]) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not (what in self.said if isinstance(what, str) else what()):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, f"{what}: {self.said}"
            time.sleep(0.02)

    def forget(self) -> None:
        self.said = ""

    def http(self) -> httpx.Client:
        headers = {"content-type": "text/plain"}
        return httpx.Client(base_url=self.address, timeout=WITHIN_S, trust_env=False, headers=headers)

    def ask(self, name: str, text: str = "hi", **more: Any) -> httpx.Response:
        with self.http() as http:
            return http.post(f"/predictions/{name}", content=text, **more)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(WITHIN_S)


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    root = tmp_path_factory.mktemp("dev")
    (root / "workflows").mkdir()
    (root / "workflows" / "steps.py").write_text(CODE)
    (root / "config.properties").write_text("max_request_size=100000\n")
    for name in NODES:
        write_workflow(root, name)
    running = Dev(root)
    yield running
    running.end()


class TestRequests:
    def test_text_and_json_and_versions(self, dev: Dev) -> None:
        assert dev.ask("shout").json() == "HI"
        assert dev.ask("shout/1.0").json() == "HI"
        assert dev.ask("shout", '{"text": "é"}', headers={"content-type": "application/json"}).json() == "É"
        assert dev.ask("shout?mark=%21").json() == "HI!"
        with dev.http() as http:
            assert http.get("/ping").json() == {"status": "Healthy"}

    def test_bodies_as_clients_send_them(self, dev: Dev) -> None:
        form = "application/x-www-form-urlencoded"
        assert dev.ask("shout", "a=b", headers={"content-type": form}).json() == "A=B"
        zipped = {"content-encoding": "gzip"}
        with dev.http() as http:
            assert http.post("/predictions/shout", content=gzip.compress(b"zip"), headers=zipped).json() == "ZIP"
            chunked = iter([b"in ", b"chunks"])
            assert http.post("/predictions/shout", content=chunked).json() == "IN CHUNKS"
        files = {"data": ("a.txt", b"a file", "text/plain")}
        response = httpx.post(f"{dev.address}/predictions/shout", files=files, data={"mark": "?"}, trust_env=False)
        assert response.json() == "A FILE?"

    def test_the_requests_id_is_the_clients_or_a_new_one(self, dev: Dev) -> None:
        assert dev.ask("shout", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
        assert len(dev.ask("shout", headers={"x-request-id": "m" * 200}).headers["x-request-id"]) == 32
        assert dev.ask("shout", "", headers={"x-request-id": "mine"}).json()["request_id"] == "mine"

    @pytest.mark.parametrize(
        ("path", "body", "headers", "status", "what"),
        [
            ("shout", "", {}, 400, "The body is empty"),
            ("none", "a", {}, 404, "Model not found: none"),
            ("shout/2.0", "a", {}, 404, "Model not found: version 2.0 of shout"),
            ("shout", "a" * 100_001, {}, 413, "larger than 100,000 bytes"),
            ("shout", "a", {"content-type": "multipart/form-data"}, 400, "names no boundary"),
            ("shout", "a", {"content-type": "multipart/form-data; boundary=b"}, 400, "The form"),
            (
                "shout",
                "a",
                {"content-type": "multipart/form-data; boundary=b", "content-encoding": "gzip"},
                415,
                "cannot be compressed",
            ),
            ("shout", "a", {"x-timeout-ms": "soon"}, 400, "x-timeout-ms is a number of milliseconds"),
        ],
    )
    def test_a_mistake_is_told_in_a_sentence(
        self, dev: Dev, path: str, body: str, headers: dict[str, str], status: int, what: str
    ) -> None:
        response = dev.ask(path, body, headers=headers)

        assert response.status_code == response.json()["code"] == status
        assert what in response.json()["message"]

    def test_other_methods_and_paths(self, dev: Dev) -> None:
        with dev.http() as http:
            assert http.request("DELETE", "/predictions/shout").status_code == 405
            assert http.get("/models").status_code == 404
            assert http.get("/predictions/shout").json()["message"].startswith("The body is empty")

    def test_a_body_that_is_too_large_and_has_no_length(self, dev: Dev) -> None:
        with dev.http() as http:
            response = http.post("/predictions/shout", content=iter([b"a" * 60_000] * 2))

        assert response.status_code == 413

    def test_many_at_once_get_their_own_answers(self, dev: Dev) -> None:
        with dev.http() as http, ThreadPoolExecutor(32) as pool:
            answers = pool.map(lambda i: http.post("/predictions/shout", content=f"n{i}").json(), range(400))

            assert list(answers) == [f"N{i}" for i in range(400)]


def connection(dev: Dev, name: str, body: str, receive_bytes: int = 0) -> socket.socket:
    """A connection over which a request was sent, and whose answer nobody reads. `receive_bytes`: of its socket."""
    host, _, port = dev.address.removeprefix("http://").partition(":")
    found = socket.socket()
    found.settimeout(WITHIN_S)
    if receive_bytes:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    found.connect((host, int(port)))
    head = f"POST /predictions/{name} HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
    found.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return found


def whole_answer(asked: socket.socket) -> bytes:
    """The body of the answer that comes over a connection."""
    response = http.client.HTTPResponse(asked)
    response.begin()
    return response.read()


def at_rest(*told: Path) -> list[int]:
    """The numbers that a node writes down with each chunk, once they do not change any more."""
    until(lambda: all(one.exists() and one.read_text() for one in told))
    last: list[int] = []
    while (now := [int(one.read_text() or 0) for one in told]) != last:
        last = now
        time.sleep(0.5)
    return last


def memory(dev: Dev) -> int:
    """The bytes of main memory that the process has."""
    return psutil.Process(dev.process.pid).memory_info().rss


class TestClientsThatLeave:
    def test_nothing_more_of_their_request_begins(self, dev: Dev, tmp_path: Path) -> None:
        for i in range(20):
            gate = tmp_path / str(i)
            left = connection(dev, "steps", f"gate {gate}")
            dev.wait_for(Path(f"{gate}.begun").exists)
            left.close()
            time.sleep(0.1)
            gate.touch()
        assert dev.ask("steps", "after").json() == "AFTER"

        assert list(tmp_path.glob("*.second")) == []

    def test_who_stays_is_answered(self, dev: Dev, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(dev.ask, "steps", f"gate {gate}")
            dev.wait_for(Path(f"{gate}.begun").exists)
            gate.touch()

            assert asked.result().json() == f"GATE {gate}".upper()
        assert Path(f"{gate}.second").exists()

    def test_a_key_cancels_as_it_does_under_torchserve(self, dev: Dev, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(dev.ask, "steps", f"gate {gate}", headers={"x-cancel-key": "k"})
            dev.wait_for(Path(f"{gate}.begun").exists)
            assert dev.ask("steps", "{}", headers={"x-cancel": "k"}).json() == {"cancelled": True}

            assert asked.result().status_code == 499
        gate.touch()


class TestStreams:
    def test_each_chunk_comes_as_soon_as_it_is_there(self, dev: Dev, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        with dev.http() as http, http.stream("POST", "/predictions/words", content=f"a b {gate} c") as response:
            chunks = response.iter_text()
            came = ""
            while came != "ab":
                came += next(chunks)
            gate.touch()

            assert came + "".join(chunks) == f"ab{gate}c"
        assert response.headers["content-type"].startswith("text/plain")

    def test_who_reads_nothing_is_waited_for_and_then_gets_all_of_it(self, dev: Dev, tmp_path: Path) -> None:
        told = tmp_path / "told"
        slow = connection(dev, "words", f"number {told}", receive_bytes=4096)
        (asked,) = at_rest(told)
        assert asked < 20, "of 60 MB: what the sockets hold, and some"

        body = whole_answer(slow)
        assert body == b"".join(b"%07d," % i * 2**17 for i in range(60))

    def test_many_who_read_nothing_cost_a_bounded_sum_and_hold_up_nobody(self, dev: Dev, tmp_path: Path) -> None:
        before = memory(dev)
        told = [tmp_path / str(i) for i in range(50)]
        unread = [connection(dev, "words", f"number {one}", receive_bytes=4096) for one in told]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda i: dev.ask("words", f"a{i} b").text, range(40))) == [
                f"a{i}b" for i in range(40)
            ]
            assert list(pool.map(lambda i: dev.ask("shout", f"a{i}").json(), range(40))) == [f"A{i}" for i in range(40)]
        assert max(at_rest(*told)) < 20
        assert memory(dev) - before < 50 * 8 * 2**20, "of 3 GB"

        assert whole_answer(unread[0]) == b"".join(b"%07d," % i * 2**17 for i in range(60))
        for one in unread:
            one.close()
        assert dev.ask("words", "a b").text == "ab"

    def test_a_client_that_leaves_ends_its_stream(self, dev: Dev, tmp_path: Path) -> None:
        told = tmp_path / "told"
        reading = connection(dev, "words", f"fill {told}")
        dev.wait_for(told.exists)
        reading.recv(1000)
        reading.close()

        (asked,) = at_rest(told)
        assert asked < 1999


HANDLER = """
from pathlib import Path
from torchserve_dag import Handler, Text

class Loud(Handler[Text, str, str, str]):
    def load(self, weights, settings, placement):
        self.mark = (weights / "mark.txt").read_text().strip()
        with Path({log!r}).open("a") as log:
            log.write(self.mark + "\\n")

    def example(self):
        return Text("example")

    def preprocess(self, item: Text) -> str:
        return item.text

    def infer(self, batch: list[str]) -> list[str]:
        return [text + self.mark for text in batch]

    def postprocess(self, output: str, item: Text) -> str:
        return output
"""

HANDLER_FILE = """
name: loud
version: "1.0"
card:
  does: A test.
  input: A text.
  output: A text.
  limits: A test.
  weights: [{file: mark.txt, source: here, licence: none, sha256: "00"}]
run: {device: cpu}
"""


class TestSaving:
    @pytest.fixture
    def project(self, tmp_path: Path) -> Iterator[Dev]:
        for folder in ("handlers", "workflows", "weights"):
            (tmp_path / folder).mkdir()
        (tmp_path / "handlers" / "loud.py").write_text(HANDLER.format(log=str(tmp_path / ".loads")))
        (tmp_path / "handlers" / "loud.yaml").write_text(HANDLER_FILE)
        (tmp_path / "weights" / "mark.txt").write_text("!")
        (tmp_path / "workflows" / "steps.py").write_text(CODE)
        nodes = "  loud: {handler: loud, input: request}\n  done: {function: done, inputs: {text: loud}}"
        (tmp_path / "workflows" / "loudly.py").write_text('def done(text: str) -> str:\n    return text + "1"\n')
        write_workflow(tmp_path, "loudly", nodes=nodes, code="loudly.py")
        write_workflow(tmp_path, "steps")
        running = Dev(tmp_path)
        yield running
        running.end()

    def test_what_is_saved_is_served_and_what_has_not_changed_stays(self, project: Dev) -> None:
        loads, function = project.root / ".loads", project.root / "workflows" / "loudly.py"
        assert project.ask("loudly").json() == "hi!1", project.said
        assert loads.read_text() == "!\n"

        project.forget()
        function.write_text(function.read_text().replace("1", "2"))
        project.wait_for("loaded in")
        assert project.ask("loudly").json() == "hi!2"
        assert loads.read_text() == "!\n", "the model stays loaded"
        assert "serves loudly" in project.said
        assert "serves steps" not in project.said

        project.forget()
        (project.root / "weights" / "mark.txt").write_text("??")
        project.wait_for("loaded in")
        assert project.ask("loudly").json() == "hi??2"
        assert loads.read_text() == "!\n??\n"

    def test_the_last_good_state_serves_on(self, project: Dev) -> None:
        function = project.root / "workflows" / "loudly.py"
        good = function.read_text()
        project.forget()
        function.write_text("def done(text: int) -> str:\n    return 'no'\n")
        project.wait_for("served as it was before")
        assert "workflows/loudly-1.0.yaml" in project.said
        assert project.ask("loudly").json() == "hi!1"

        project.forget()
        function.write_text("import nothing_of_that_name\n")
        project.wait_for('there is no module "nothing_of_that_name"')
        assert project.ask("loudly").json() == "hi!1"

        project.forget()
        (project.root / "weights" / "mark.txt").unlink()
        function.write_text(good)
        project.wait_for("served as it was before")
        assert "FileNotFoundError" in project.said
        assert project.ask("loudly").json() == "hi!1"

        (project.root / "weights" / "mark.txt").write_text("!")
        function.write_text(good.replace("1", "3"))
        project.wait_for(lambda: project.ask("loudly").json() == "hi!3")

    def test_workflows_come_and_go(self, project: Dev) -> None:
        made = write_workflow(project.root, "shout", "2.0")
        project.wait_for("serves shout 2.0")
        assert project.ask("shout").json() == "HI"
        made.unlink()
        project.wait_for(lambda: project.ask("shout").status_code == 404)

        assert project.ask("steps").json() == "HI"

    def test_a_request_inside_is_answered_by_what_it_entered(self, project: Dev, tmp_path: Path) -> None:
        gate = tmp_path / ".gate"
        steps = project.root / "workflows" / "steps.py"
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(project.ask, "steps", f"gate {gate}")
            project.wait_for(Path(f"{gate}.begun").exists)
            steps.write_text(CODE.replace("return text.text.upper()", 'return "new"'))
            project.wait_for(lambda: project.ask("steps").json() == "new")
            gate.touch()

            assert asked.result().json() == f"GATE {gate}".upper()

    def test_a_model_that_hangs_is_loaded_again(self, project: Dev) -> None:
        code = "import time\nfrom torchserve_dag import Text\ndef nap(text: Text) -> Text:\n    time.sleep(600)\n    return text\n"
        (project.root / "workflows" / "nap.py").write_text(code)
        made = write_workflow(
            project.root, "nap", nodes="  nap: {function: nap, inputs: {text: request}}", code="nap.py"
        )
        made.write_text(made.read_text().replace("timeout_s: 90", "timeout_s: 1"))
        project.wait_for("serves nap")
        project.forget()
        assert project.ask("nap").status_code == 504
        project.wait_for("serves nap")

        assert "saved:" not in project.said
        assert project.ask("steps").json() == "HI"

    def test_one_that_hangs_and_cannot_be_loaded_is_told_once(self, project: Dev) -> None:
        code = "import time\nfrom torchserve_dag import Text\ndef nap(text: Text) -> Text:\n    time.sleep(600)\n    return text\n"
        (project.root / "workflows" / "nap.py").write_text(code)
        made = write_workflow(
            project.root, "nap", nodes="  nap: {function: nap, inputs: {text: request}}", code="nap.py"
        )
        made.write_text(made.read_text().replace("timeout_s: 90", "timeout_s: 1"))
        project.wait_for("serves nap")
        project.forget()
        made.write_text(made.read_text() + "nodes: [\n")
        project.wait_for("served as it was before")
        assert project.ask("nap").status_code == 504
        time.sleep(3)  # three looks for hanging models, and more

        assert project.said.count("error:") == 1
        assert project.ask("steps").json() == "HI"

    def test_a_handler_that_ends_its_process_costs_the_others_nothing(self, project: Dev) -> None:
        handler = project.root / "handlers" / "loud.py"
        good = handler.read_text()
        project.forget()
        handler.write_text(good.replace("self.mark =", "raise SystemExit(3)\n        self.mark ="))
        project.wait_for("loading it raised SystemExit: 3")
        assert project.ask("loudly").json() == "hi!1"
        handler.write_text(good.replace("text + self.mark", "text + self.mark * 2"))

        project.wait_for(lambda: project.ask("loudly").json() == "hi!!1")

    def test_the_models_of_bad_states_do_not_stay(self, tmp_path: Path, project: Dev) -> None:
        """A workflow that is broken for long, and a handler that is saved again and again."""
        project.end()
        loader = DevLoader(Project(project.root))
        (project.root / "workflows" / "broken.yaml").write_text("nodes: [")
        for text in "abc":
            (project.root / "weights" / "mark.txt").write_text(text * (1 + ord(text)))
            assert len(loader.load().problems) == 1

        assert len(loader._handlers._stages) == 1

    def test_another_version_in_the_same_file_replaces_the_first(self, project: Dev) -> None:
        project.end()
        loader, path = DevLoader(Project(project.root)), project.root / "workflows" / "steps-1.0.yaml"
        loader.load()
        (project.root / "workflows" / "broken.yaml").write_text("nodes: [")
        path.write_text(path.read_text().replace('"1.0"', '"2.0"'))

        assert loader.load().services.keys() == {("loudly", "1.0"), ("steps", "2.0")}

    def test_a_terminal_that_is_closed(self, project: Dev) -> None:
        """What is printed goes nowhere, and saves are served on."""
        project.end()
        command = [sys.executable, "-m", "torchserve_dag", "dev", "--port", "0", "--project", str(project.root)]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert running.stdout
            said = ""
            for line in running.stdout:
                said += line
                if "loaded in" in line:
                    break
            running.stdout.close()
            project.address = re.findall(r"http://127\.0\.0\.1:\d+", said)[0]
            for new in ("one", "two"):
                code = CODE.replace("return text.text.upper()", f'return "{new}"')
                (project.root / "workflows" / "steps.py").write_text(code)
                until(lambda new=new: project.ask("steps").json() == new)
        finally:
            running.kill()
            running.wait(WITHIN_S)

    def test_what_is_named_is_served_and_nothing_else(self, project: Dev) -> None:
        project.end()
        named = Dev(project.root, "steps", "loud")
        try:
            assert [named.ask(name).status_code for name in ("steps", "loud", "loudly")] == [200, 200, 404]
        finally:
            named.end()
        loaded = DevLoader(Project(project.root), ["stps"]).load()
        assert [problem.help for problem in loaded.problems] == ['did you mean "steps"?']

    def test_a_port_in_use(self, project: Dev) -> None:
        port = project.address.rpartition(":")[2]
        command = [sys.executable, "-m", "torchserve_dag", "dev", "--port", port, "--project", str(project.root)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)

        assert found.returncode == 1
        assert f"127.0.0.1:{port} cannot be listened at" in found.stderr.replace("\n", " ")

    def test_a_largest_body_that_is_no_number(self, project: Dev) -> None:
        (project.root / "config.properties").write_text("max_request_size=many\n")
        command = [sys.executable, "-m", "torchserve_dag", "dev", "--port", "0", "--project", str(project.root)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)

        assert (found.returncode, "Traceback" in found.stderr) == (1, False)
        assert 'max_request_size of config.properties is "many"' in found.stderr.replace("\n", " ")


class RaisingService:
    """A service of an archive that breaks the protocol: it raises for a request instead of answering a failure."""

    name, version, timeout_s, streams = "m", "1.0", 1.0, False

    def together(self) -> Any:
        return contextlib.nullcontext()

    def submit(self, request: ServiceRequest, on_chunk: Any = None) -> PendingResponse:
        if request.id == "bad":
            raise TypeError("another protocol")
        return WaitingResponse()


class WaitingResponse:
    """Done once it is cancelled."""

    def add_done_callback(self, callback: Any) -> None:
        self.callback = callback

    def cancel(self) -> None:
        self.callback(ServiceResponse(b"cancelled", status=499))


class TestEntrance:
    def test_a_service_that_raises_is_a_failure_of_that_request(self) -> None:
        async def ask() -> list[int]:
            entrance = Entrance(RaisingService())  # type: ignore[arg-type]
            bad, good = (entrance.submit(ServiceRequest(name), in_chunks=False) for name in ("bad", "good"))
            statuses = [(await bad.next()).status]  # type: ignore[union-attr]
            good.cancel()
            statuses.append((await good.next()).status)  # type: ignore[union-attr]
            await asyncio.wait_for(entrance.empty.wait(), WITHIN_S)
            return statuses

        assert asyncio.run(ask()) == [500, 499]

    def test_a_client_that_has_left_before_its_request_entered(self) -> None:
        async def ask() -> int:
            entrance = Entrance(RaisingService())  # type: ignore[arg-type]
            left = entrance.submit(ServiceRequest("good"), in_chunks=False)
            left.cancel()
            status = (await left.next()).status  # type: ignore[union-attr]
            await asyncio.wait_for(entrance.empty.wait(), WITHIN_S)
            return status

        assert asyncio.run(ask()) == 499

    def test_one_request_too_many_is_refused_until_another_is_answered(self) -> None:
        async def ask() -> list[tuple[int, Any]]:
            entrance = Entrance(RaisingService(), most=1)  # type: ignore[arg-type]
            first, many = (entrance.submit(ServiceRequest(name), in_chunks=False) for name in ("good", "good"))
            refused = await many.next()
            first.cancel()
            await first.next()
            after = entrance.submit(ServiceRequest("bad"), in_chunks=False)
            answers = [refused, await after.next()]
            await asyncio.wait_for(entrance.empty.wait(), WITHIN_S)
            return [(answer.status, dict(answer.headers)) for answer in answers]  # type: ignore[union-attr]

        assert asyncio.run(ask()) == [(503, {"Retry-After": "1"}), (500, {})]

    def test_one_token_leaves_room_for_others(self) -> None:
        async def ask() -> list[int]:
            entrance = Entrance(RaisingService(), most=8)  # type: ignore[arg-type]

            def submit(token: str) -> InFlight:
                return entrance.submit(ServiceRequest("good", options={"x-door-token": token}), in_chunks=False)

            inside = [submit("greedy") for _ in range(7)]
            statuses = [(await submit("greedy").next()).status]  # type: ignore[union-attr]
            inside.append(submit("other"))
            statuses.append((await submit("other").next()).status)  # type: ignore[union-attr]
            first = inside.pop(0)
            first.cancel()
            statuses.append((await first.next()).status)  # type: ignore[union-attr]
            inside.append(submit("greedy"))
            for one in inside:
                one.cancel()
            statuses += [(await one.next()).status for one in inside]  # type: ignore[union-attr]
            await asyncio.wait_for(entrance.empty.wait(), WITHIN_S)
            return statuses

        assert asyncio.run(ask()) == [429, 503, *[499] * 9]


class TestForms:
    def test_parts_in_their_order(self) -> None:
        """A field that is no file has no content type, whatever its client says, as under TorchServe."""
        body = (
            b'--b\r\ncontent-type: application/json\r\nContent-Disposition: form-data; name="a"\r\n\r\none\r\n'
            b"--b\r\nContent-Disposition: form-data; name=\"f\"; filename*=utf-8''x\r\n\r\ntwo\r\n"
            b'--b\r\ncontent-type: text/plain\r\nContent-Disposition: form-data; name="g"; filename="y"\r\n\r\n\r\n--b--\r\n'
        )
        found = [
            (part.name, part.content, part.content_type) for part in parts_of(body, "multipart/form-data; boundary=b")
        ]

        assert found == [("a", b"one", None), ("f", b"two", "application/octet-stream"), ("g", b"", "text/plain")]

    @pytest.mark.parametrize(
        ("body", "why"),
        [
            (b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\none', "has no end"),
            (b"--b\r\nContent-Disposition: form-data\r\n\r\none\r\n--b--\r\n", "has no name"),
            (b"--b\r\nX: " + b"a" * 9000 + b"\r\n\r\none\r\n--b--\r\n", "Maximum header size exceeded"),
            (
                b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * (MAX_PARTS + 1) + b"--b--",
                "more than 1,000 parts",
            ),
            (b"nothing of that form", "The form"),
        ],
    )
    def test_what_is_no_form_is_refused(self, body: bytes, why: str) -> None:
        with pytest.raises(FormError, match=why):
            parts_of(body, "multipart/form-data; boundary=b")
