"""The command line against a real TorchServe: build, up, call, status, default, down, and nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from torchserve_dag.archives import mar
from torchserve_dag.clients import KeyFile, RestClient
from torchserve_dag.server import java, processes, properties
from torchserve_dag.server.connect import running
from torchserve_dag.server.logs import Logs
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.ready import StartupWait
from torchserve_dag.server.state import State
from torchserve_dag.stack import start as stack

ROOT = Path(__file__).parents[2]

HANDLER = """
from __future__ import annotations
from dataclasses import dataclass
from torchserve_dag import Handler, InputError, Text

@dataclass(frozen=True)
class Settings:
    ending: str = "."
    broken: bool = False

class Shout(Handler[Text, str, str, Text]):
    Settings = Settings
    def load(self, folder, settings, placement):
        if settings.broken:
            raise RuntimeError("this model cannot be loaded")
        self.ending = settings.ending
    def example(self) -> Text: return Text("example")
    def preprocess(self, item: Text) -> str:
        if item.text == "bad": raise InputError("That text is bad.", 422)
        return item.text
    def infer(self, batch): return [text.upper() for text in batch]
    def postprocess(self, output: str, item: Text) -> Text: return Text(output + self.ending)
"""

CARD = "card: {does: Shouts., input: Text., output: Text., limits: Made for a test., weights: []}\n"


def write(project: Path, name: str, version: str, settings: str) -> None:
    text = f'name: {name}\nversion: "{version}"\ncode: shout.py\nsettings: {settings}\n{CARD}'
    (project / "handlers" / f"{name}-{version}.yaml").write_text(text)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A project with one handler in two versions, which TorchServe may serve."""
    (tmp_path / "handlers").mkdir()
    (tmp_path / "handlers" / "shout.py").write_text(HANDLER)
    write(tmp_path, "shout", "1.9", "{ending: ' (9)'}")
    write(tmp_path, "shout", "1.10", "{ending: ' (10)'}")
    for name in ("config.properties", "log4j2.xml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "hello.txt").write_text("hello")
    yield tmp_path
    stack.stop(tmp_path)


def run(project: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torchserve_dag", *words]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def answer(project: Path, *words: str) -> Any:
    return json.loads(run(project, *words, "--json").stdout)


def leftovers() -> set[str]:
    names = (path.name for path in Path(tempfile.gettempdir()).iterdir())
    return {name for name in names if name.startswith((".ts.sock", ".model_server", "models", "hsperf"))}


def test_a_project_is_built_served_called_and_stopped(project: Path) -> None:
    before = leftovers()
    built = answer(project, "build")
    run(project, "up", "--free-ports", "--access-log")
    state = State(project)

    assert [one["state"] for one in built["built"]] == ["built", "built"]
    assert answer(project, "call", "shout", "hello.txt") == {"text": "HELLO (10)"}  # the highest, not the last by name
    assert answer(project, "call", "shout/1.9", "hello.txt", "--grpc", "--param", "a=b") == {"text": "HELLO (9)"}

    (project / "bad.txt").write_text("bad")
    refused = run(project, "call", "shout", "bad.txt", code=1)
    assert "That text is bad." in refused.stderr
    assert run(project, "call", "shout/3.0", "hello.txt", code=1).stderr.count("\n") == 1

    versions = answer(project, "status")["versions"]
    assert [(v["version"], v["default"], v["state"]) for v in versions] == [
        ("1.9", False, "ready"),
        ("1.10", True, "ready"),
    ]
    assert all(worker["memory_mb"] > 10 for version in versions for worker in version["workers"])
    about = answer(project, "status", "shout/1.9")
    assert about["card"]["does"] == "Shouts."
    assert about["hash"] == versions[0]["hash"] == mar.content_hash(project / "model_store" / "shout-1.9.mar")

    run(project, "default", "shout", "1.9")
    assert answer(project, "call", "shout", "hello.txt") == {"text": "HELLO (9)"}
    assert "running already" in run(project, "up", code=1).stderr
    assert "POST /predictions/shout" in (state.logs / "access_log.log").read_text()

    assert run(project, "down").stdout == "stopped\n"
    assert run(project, "down").stdout == "nothing was running\n"
    assert processes.family(state) == []
    assert not state.tmp.exists()
    assert not state.key_file.exists()
    made = {"model_store", ".torchserve-dag", "bad.txt", "releases.yaml"}
    assert {path.name for path in project.iterdir()} - made == {
        "handlers",
        "config.properties",
        "log4j2.xml",
        "hello.txt",
    }
    assert leftovers() == before

    write(project, "broken", "1.0", "{broken: true}")
    write(project, "broken_stream", "1.0", "{broken: true}")
    stream = project / "handlers" / "broken_stream-1.0.yaml"
    stream.write_text(stream.read_text() + "serve: {mode: asynchronous}\n")
    write(project, "shout", "1.8", "{}")
    run(project, "build")
    (project / "model_store" / "torn.mar").write_bytes((project / "model_store" / "shout-1.8.mar").read_bytes()[:9000])
    served = run(project, "up", "--free-ports", "--no-front-door")  # what can be served is
    for sentence in (
        "failed: broken 1.0: A worker of broken 1.0 keeps failing: RuntimeError: this model cannot be loaded",
        "failed: broken_stream 1.0: A worker of broken_stream 1.0 keeps failing: RuntimeError: this model",
        "failed: torn.mar: it is not an archive",
        "left out: shout 1.8: an older version: torchserve-dag serve shout/1.8 loads it",
    ):
        assert sentence in served.stderr
    assert [(v["name"], v["version"]) for v in answer(project, "status")["versions"]] == [
        ("shout", "1.9"),
        ("shout", "1.10"),
    ]
    assert answer(project, "call", "shout", "hello.txt") == {"text": "HELLO (9)"}  # the default that was set is kept
    assert "runs without the front door" in run(project, "rollout", "shout", "1.10", code=1).stderr

    os.kill(running(state).pid, signal.SIGKILL)  # Java dies, and cannot end its workers
    run(project, "down")
    assert processes.family(state) == []


def test_where_nothing_can_be_served_up_ends_with_the_reason(project: Path) -> None:
    write(project, "broken", "1.0", "{broken: true}")
    run(project, "build", "broken")
    failed = run(project, "up", "--free-ports", code=1)

    assert "A worker of broken 1.0 keeps failing: RuntimeError: this model cannot be loaded" in failed.stderr
    assert processes.family(State(project)) == []


def test_stock_torchserve_serves_the_same_folder_from_its_root(project: Path) -> None:
    """`torchserve --start --ncs --ts-config config.properties --model-store model_store`, with no help of ours."""
    run(project, "build", "shout/1.9")
    state = State(project)
    state.prepare()
    free = Addresses().with_free_ports()
    properties.write(project / "config.properties", state.folder / "moved", properties.listening_at(free))
    shutil.copy(state.folder / "moved", project / "config.properties")
    command = [sys.executable, "-m", "ts.model_server", "--start", "--ncs"]
    command += ["--ts-config", "config.properties", "--model-store", "model_store"]
    java_home = {"JAVA_HOME": str(java.find()), "TEMP": str(state.tmp), "TMPDIR": str(state.tmp)}
    environment = {**os.environ, **java_home, **processes.mark(state)}
    logs = Logs(project / "logs")
    try:
        subprocess.run(command, cwd=project, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=500)
        tokens = written_tokens(project / "key_file.json")
        keys = {"token": tokens.inference, "management_token": tokens.management}
        with RestClient(free.inference, free.management, **keys) as client:
            StartupWait({("shout", "1.9"): "shout-1.9.mar"}, logs).wait(client, psutil.Process, 500)

            assert client.predict("shout", b"hello") == {"text": "HELLO (9)"}
    finally:
        processes.kill(processes.family(state))

    assert (project / "logs" / "model_log.log").stat().st_size > 0  # log4j2.xml was found beside config.properties
    assert not (project / "logs" / "ts_metrics.log").exists()


def written_tokens(path: Path) -> KeyFile:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            return KeyFile.read(path)
        except (OSError, ValueError):
            time.sleep(0.1)
    pytest.fail(f"there are no tokens in {path}")
