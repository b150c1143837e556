"""Rollouts on a real server under constant load: good versions go all the way, bad ones go back by themselves."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.live.conftest import run_tool
from tests.live.door import PROTOCOLS, Served, ask, new_project, tool, write_version
from torchserve_dag.clients import ServingError
from torchserve_dag.commands import app
from torchserve_dag.commands.release import STOP_IF
from torchserve_dag.front_door.door import Door
from torchserve_dag.releases import manual
from torchserve_dag.releases.rollout_store import RolloutStore
from torchserve_dag.server import releases_file
from torchserve_dag.server.connect import host_client

ROLLED_BACK_WITHIN_S = 15

FUNCTIONS = """
from __future__ import annotations
import os, random, time
from torchserve_dag import Text

def old(text: Text) -> Text: time.sleep(0.005); return Text("1.0")
def good(text: Text) -> Text: time.sleep(0.005); return Text("2.0")
def slow(text: Text) -> Text: time.sleep(0.06); return Text("2.0")
def failing(text: Text) -> Text:
    time.sleep(0.005)
    if random.random() < 0.05: raise RuntimeError("one of twenty")
    return Text("2.0")
def crashing(text: Text) -> Text:
    if random.random() < 0.1: os._exit(1)
    return Text("2.0")
"""
NEVER = """
from __future__ import annotations
import os
from torchserve_dag import Text
if "LOG_LOCATION" in os.environ: raise RuntimeError("this version cannot be loaded")
def never(text: Text) -> Text: return text
"""
BAD = {
    "slow": (STOP_IF, r"p[59][09] \d+ ms of \d+ requests, over \d+ ms, 1.3 times the old version's \d+ ms"),
    "failing": ("errors > 1%", r"errors [\d.]+% of \d+ requests, over 1.00%"),
    "crashing": ("errors > 1%", r"errors [\d.]+% of \d+ requests, over 1.00%"),
    "never": ("errors > 1%", r"2\.0 could not be loaded: A worker of never 2\.0 keeps failing: .*cannot be loaded"),
}
"""What stops each, and the reason that it gives."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Every model's 1.0 is served, and its 2.0 is in the model store."""
    root = tmp_path_factory.mktemp("rollout")
    new_project(root)
    (root / "workflows" / "paced.py").write_text(FUNCTIONS)
    (root / "workflows" / "never.py").write_text(NEVER)
    for name in ("good", *BAD):
        write_version(root, name, "1.0", "old", "paced.py")
        write_version(root, name, "2.0", name, "never.py" if name == "never" else "paced.py")
    run_tool(root, "build", *(f"{name}/1.0" for name in ("good", *BAD)))
    routes = (
        f'{name}:\n  versions: {{"1.0": 100}}  # {name}\n  fallback: "1.0"\n'
        for name in ("good", "failing", "crashing")
    )
    (root / "routes.yaml").write_text("".join(routes))
    run_tool(root, "up", "--free-ports")
    run_tool(root, "build")
    yield Served(root)
    run_tool(root, "down")


class Load:
    """Requests for some models at a constant rate, over both protocols."""

    def __init__(self, served: Served, models: list[str], per_second: float) -> None:
        self.answers: dict[str, Counter[str]] = defaultdict(Counter)
        self._stop = threading.Event()
        self._served, self._models, self._pause = served, models, 8 / per_second

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(8)
        self._working = [self._pool.submit(self._work, PROTOCOLS[i % 2], i) for i in range(8)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for one in self._working:
            one.result(60)
        self._pool.shutdown()

    def _work(self, protocol: str, turn: int) -> None:
        with self._served.client(protocol) as client:
            while not self._stop.is_set():
                began, turn = time.monotonic(), turn + 1
                model = self._models[turn % len(self._models)]
                try:
                    self.answers[model][ask(client, model)] += 1
                except ServingError as error:
                    self.answers[model][f"{type(error).__name__}: {error}"] += 1
                time.sleep(max(0.0, self._pause - (time.monotonic() - began)))


def rollout(served: Served, *words: str, code: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "torchserve_dag", "rollout", *words, "--json"]
    done = subprocess.run(command, cwd=served.root, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_a_good_version_takes_over_and_goes_back_and_no_request_fails(served: Served) -> None:
    """The version comes while it serves; routes.yaml says in the end what is served, and keeps its comments."""
    path, data = served.root / "routes.yaml", served.root / "data.jsonl"
    data.write_text('{"input": "which?", "expected": "2.0"}\n')
    tool(served.root, "evaluate", "good/2.0", "--data", str(data), "--score", "exact")
    with Load(served, ["good"], 100) as load:
        time.sleep(0.5)
        steps = ("--canary", "20,100", "--every", "2s", "--stop-if", "errors > 1%")
        done = rollout(served, "good", "2.0", *steps, "--require", "exact >= 1", "--require", "errors <= 0")
        assert (done["stage"], done["share"], done["before"]) == ("done", 100, {"1.0": 100})
        assert 'versions: {"2.0": 100}  # good' in path.read_text()
        time.sleep(0.5)
        assert {ask_one(served, "good") for _ in range(20)} == {"2.0"}

        began = time.monotonic()
        tool(served.root, "rollback", "good")
        assert time.monotonic() - began < ROLLED_BACK_WITHIN_S
        assert {ask_one(served, "good") for _ in range(20)} == {"1.0"}
    assert set(load.answers["good"]) == {"1.0", "2.0"}
    assert 'versions: {"1.0": 100}  # good' in path.read_text()

    with host_client(served.state) as client:
        client.set_default("good", "2.0")  # as at a start with both: TorchServe keeps its default version
    Door(served.state).change(lambda now: replace(now, defaults={**now.defaults, "good": "2.0"}))
    tool(served.root, "retire", "good/2.0")
    with host_client(served.state) as client:
        assert [v.version for m in client.models() if m.name == "good" for v in m.versions] == ["1.0"]
    assert (decided(served, "good", "1.0"), Door(served.state).traffic().defaults["good"]) == ("default", "1.0")
    assert decided(served, "good", "2.0") == "retired"  # the next start leaves it out too


def test_a_version_that_loads_is_rolled_back_at_once(served: Served) -> None:
    store = RolloutStore(served.state)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(rollout, served, "good", "2.0", code=1)
        wait_for(lambda: (now := store.progress("good")) and now.stage == "loading")
        began = time.monotonic()
        gone = manual.roll_back(served.root, "good")

        assert time.monotonic() - began < ROLLED_BACK_WITHIN_S
        assert (gone.stage, gone.reason) == ("back", "it was rolled back by hand")
        assert asked.result()["stage"] == "back"
    with host_client(served.state) as client:
        assert [v.version for m in client.models() if m.name == "good" for v in m.versions] == ["1.0"]
    assert {ask_one(served, "good") for _ in range(20)} == {"1.0"}


def decided(served: Served, model: str, version: str) -> str:
    """What releases.yaml says of a version."""
    return releases_file.decided(releases_file.read(served.root))[model, version][0]


def ask_one(served: Served, model: str) -> str:
    with served.client("rest") as client:
        return ask(client, model)


def test_bad_versions_are_stopped_and_rolled_back_by_themselves(served: Served) -> None:
    """Each with its reason, all at once; where there is a fallback, no client sees a failure meanwhile."""
    import re

    def one(name: str) -> dict[str, Any]:
        words = ["--canary", "50,100", "--every", "20s", "--stop-if", BAD[name][0], "--ready", "5m"]
        return rollout(served, name, "2.0", *words, code=1)

    with Load(served, list(BAD), 160) as load, ThreadPoolExecutor(len(BAD)) as pool:
        time.sleep(0.5)
        found = dict(zip(BAD, pool.map(one, BAD), strict=True))
        after = {name: {ask_one(served, name) for _ in range(10)} for name in BAD}

    for name, (_, reason) in BAD.items():
        assert found[name]["stage"] == "back", name
        assert re.search(reason, found[name]["reason"]), found[name]["reason"]
        assert after[name] == {"1.0"}, name  # all of the requests are back with the old version
        assert set(load.answers[name]) <= {"1.0", "2.0"}, name
    assert set(load.answers["never"]) == {"1.0"}
    assert load.answers["slow"]["2.0"] > 0
    with host_client(served.state) as client:
        assert [v.version for m in client.models() if m.name == "never" for v in m.versions] == ["1.0"]


def test_a_rollout_goes_on_without_its_terminal_and_is_promoted_by_hand(served: Served) -> None:
    with Load(served, ["slow"], 60):
        begun = rollout(
            served, "slow", "2.0", "--canary", "10,100", "--every", "10m", "--stop-if", "errors > 1%", "--no-watch"
        )
        assert begun["stage"] == "waiting"
        refused = subprocess.run(
            [sys.executable, "-m", "torchserve_dag", "rollout", "slow", "2.0"],
            cwd=served.root, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "is being rolled out to 2.0 already" in refused.stderr
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: shown(served, "slow")["share"] == 10)
        assert json.loads(tool(served.root, "promote", "slow", "--json"))["stage"] == "done"

    assert {ask_one(served, "slow") for _ in range(10)} == {"2.0"}  # its default now: routes.yaml does not know it
    assert decided(served, "slow", "2.0") == "default"  # though its first rollout was rolled back
    assert decided(served, "failing", "2.0") == "rejected"
    assert "promoted by hand" in tool(served.root, "rollout", "status")


def shown(served: Served, model: str) -> dict[str, Any]:
    found = json.loads(tool(served.root, "rollout", "status", "--json"))
    return next(one for one in found if one["plan"]["model"] == model)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_new_model_and_other_versions_come_into_the_running_server(served: Served) -> None:
    """And what is served stays what it is, whatever happens to the file in the store."""
    plain = served.root / "model_store" / "plain-2024-10-1+cpu.mar"
    with zipfile.ZipFile(plain, "w") as made:
        model = {"modelName": "plain", "modelVersion": "2024-10-1+cpu", "handler": "h.py"}
        made.writestr(
            "MAR-INF/MANIFEST.json", json.dumps({"model": model, "archiverVersion": "0.12.0", "runtime": "python"})
        )
        made.writestr("h.py", "def handle(rows, context): return ['plain' for _ in rows or []]")
    assert "it answers requests that name no version" in tool(served.root, "serve", "plain")
    for protocol in PROTOCOLS:
        with served.client(protocol) as client:
            assert client.predict("plain", b"hi", "2024-10-1+cpu") == client.predict("plain", b"hi") == b"plain"
    status = tool(served.root, "status", "plain")
    assert "name plain" in status
    assert "built by another tool" in status

    for version in ("1.0", "1.1"):
        write_version(served.root, "fresh", version, "old" if version == "1.0" else "good", "paced.py")
    tool(served.root, "build", "fresh")
    tool(served.root, "rollout", "fresh", "1.0")  # the first version of a model
    assert "rollout fresh 1.1 gives it a share of the others" in " ".join(
        tool(served.root, "serve", "fresh/1.1").split()
    )
    with served.client("rest") as client:
        assert [ask(client, "fresh"), ask(client, "fresh", "1.1")] == ["1.0", "2.0"]
    assert (decided(served, "fresh", "1.0"), decided(served, "fresh", "1.1")) == ("default", "served")

    archive = served.root / "model_store" / "fresh-1.1.mar"
    write_version(served.root, "fresh", "1.1", "slow", "paced.py")
    assert "fresh-1.1.mar is served now" in tool(served.root, "build", "--force", "fresh/1.1", code=1)
    archive.write_bytes((served.root / "model_store" / "good-1.0.mar").read_bytes())
    pack_as(archive, "fresh", "1.1")
    assert "a version never changes" in tool(served.root, "rollout", "fresh", "1.1", code=1)
    assert "differs: fresh 1.1: " in said_by_status(served)
    with served.client("rest") as client:
        assert ask(client, "fresh", "1.1") == "2.0"

    live = json.loads(graph_live(served, "fresh/1.1"))
    assert (live["version"], live["nodes"][0]["name"]) == ("1.1", "answer")


def pack_as(archive: Path, name: str, version: str) -> None:
    """Give an archive another name and version, as copying the wrong file does."""
    with zipfile.ZipFile(archive) as before:
        entries = {entry: before.read(entry) for entry in before.namelist()}
    manifest = json.loads(entries["MAR-INF/MANIFEST.json"])
    manifest["model"] |= {"modelName": name, "modelVersion": version}
    entries["MAR-INF/MANIFEST.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(archive, "w") as after:
        for entry, body in entries.items():
            after.writestr(entry, body)


def said_by_status(served: Served) -> str:
    found = CliRunner().invoke(app, ["status", "--project", str(served.root)])
    return found.stderr


def graph_live(served: Served, name: str) -> str:
    """What graph --live prints, while requests come."""
    stop = threading.Event()

    def send() -> None:
        with served.client("rest") as client:
            while not stop.is_set():
                ask(client, *name.split("/"))

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send)
        try:
            return tool(served.root, "graph", name, "--live", "--seconds", "3", "--json")
        finally:
            stop.set()
            sending.result(60)


def test_what_cannot_be_rolled_out_is_refused_in_one_sentence(served: Served) -> None:
    refused = {
        ("good", "9.0"): "There is no archive of good/9.0",
        ("nobody", "2.0"): "There is no archive of nobody/2.0",
        ("good", "2.0", "--canary", "50,20"): '"50,20" is not a list of steps',
        ("good", "2.0", "--every", "soon"): '"soon" is not a time',
        ("good", "2.0", "--stop-if", "errors > 5"): '"errors > 5" is not a condition',
        ("good", "2.0", "--require", "exact"): '"exact" is not a requirement',
        ("slow", "2.0", "--require", "exact >= .8"): "slow/2.0 was not evaluated, and exact >= 0.8 is required",
        ("good", "2.0", "--require", "exact > 1"): "good/2.0 has exact 1 of 1 items",
        ("good",): "Which version of good?",
    }
    for words, sentence in refused.items():
        said = tool(served.root, "rollout", *words, code=1)

        assert sentence in said
        assert said.count("\n") == 1
    assert "it is the default" in tool(served.root, "retire", "slow/2.0", code=1)
    assert "No rollout of good is running" in tool(served.root, "promote", "good", code=1)
    assert "nobody was never rolled out" in tool(served.root, "rollback", "nobody", code=1)
    again = tool(served.root, "rollback", "failing", code=1)
    assert "The last rollout of failing, to 2.0, was rolled back already" in again
    assert "now 1.0 100% of it answers" in again
    assert "torchserve-dag rollout failing VERSION" in again
