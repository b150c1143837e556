"""Every block of the README is what it says it is: files are quoted as they are, and commands and code run.

The last file of this folder: its commands stop the server that the other files use.
"""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path

import httpx
import pytest
import yaml

from tests.live.conftest import ROOT
from tests.live.demo.conftest import Demo, Run
from torchserve_dag.pictures.mermaid import mermaid
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.server import properties

BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
SCRIPTS, LANGUAGE = "./scripts/demo\n./scripts/test\n", "./scripts/demo language\n"


def blocks(kind: str) -> list[str]:
    return [text for name, text in BLOCKS if name == kind]


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {name for name, _ in BLOCKS} == {
        "sh",
        "console",
        "text",
        "yaml",
        "mermaid",
        "python",
    }  # console: test_wheel.py
    assert blocks("sh")[0] == SCRIPTS  # the first is run below, and the second is what runs this


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_file_is_quoted_as_it_is(text: str) -> None:
    first, _, rest = text.partition("\n")

    assert rest == (ROOT / first.removeprefix("# ")).read_text("utf-8")


@pytest.mark.parametrize("text", blocks("mermaid"))
def test_the_graph_is_drawn_from_its_file(text: str) -> None:
    assert text == mermaid(read_graph(Project(ROOT), ROOT / "workflows" / "detect_classify.yaml"))


def test_the_demo_prints_what_the_readme_shows(serving: Demo, run: Run) -> None:
    """But for the milliseconds; and run again, it goes on with the server that it started."""
    shown, _ = blocks("text")
    first, again = serving.printed, run("./scripts/demo")

    for line in shown.splitlines():
        assert without_times(line) in [without_times(one) for one in first.splitlines()]
    assert "torchserve-dag up" in first
    assert "torchserve-dag up" not in again


def without_times(line: str) -> str:
    return re.sub(r"│ [ \d]{7} (?=│)", "│ time    ", line)


@pytest.mark.parametrize("text", blocks("python"))
def test_the_code_runs(serving: Demo, run: Run, text: str) -> None:
    """With the server that the demo started."""
    port = yaml.safe_load((serving.root / "front_door.yaml").read_text())["listen"].rpartition(":")[2]
    (serving.root / "block.py").write_text(text.replace(":8443", f":{port}"), "utf-8")
    if "alice.token" in text:
        run("torchserve-dag token new code > alice.token")
    run("python block.py")


def test_the_demo_stops_what_it_started(serving: Demo, run: Run) -> None:
    assert run("./scripts/demo --stop") == "stopped\n"


def test_the_language_models_demo_prints_what_the_readme_shows(run: Run) -> None:
    _, shown = blocks("text")
    printed = run(LANGUAGE.strip()).splitlines()
    run("./scripts/demo --stop")

    answers = [line for line in shown.splitlines() if line and not line.startswith("$")]
    assert len(answers) == 2
    assert [line for line in answers if line not in printed] == []


@pytest.mark.parametrize("text", [text for text in blocks("sh")[1:] if text != LANGUAGE])
def test_the_commands_run(run: Run, copy: Path, text: str) -> None:
    """Each line in the shell that the last one left; where TorchServe starts by itself, it comes to serve."""
    before: list[str] = []
    for line in text.splitlines():
        if line.startswith("export "):
            before.append(line)
            continue
        starts = shlex.split(line)[:2] == ["torchserve", "--start"]
        # Java keeps what it inherits: a pipe would never end.
        run("; ".join([*before, f"{line} > torchserve.log 2>&1 < /dev/null" if starts else line]))
        if starts:
            wait_until_served(copy)


def wait_until_served(copy: Path) -> None:
    where = properties.addresses(properties.read(copy / "config.properties"))
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline:
        try:
            keys = httpx.Response(200, text=(copy / "key_file.json").read_text("utf-8")).json()
            headers = {"Authorization": f"Bearer {keys['inference']['key']}"}
            url = f"{where.inference}/predictions/detect_classify/1.0"
            answer = httpx.post(url, content=(ROOT / "photos/coffee.jpg").read_bytes(), headers=headers, timeout=60)
            if answer.status_code == 200:
                assert answer.json()["summary"] == "1 cup"
                return
        except (OSError, ValueError, httpx.TransportError):
            pass
        time.sleep(1)
    pytest.fail("TorchServe did not come to serve the workflow within 500 s")


def test_the_handler_of_the_readme_is_one() -> None:
    """It is loaded and run as a plain object, as the text beside it says."""
    (text,) = [one for one in blocks("python") if "class Brightness" in one]
    found: dict[str, type] = {}
    exec(compile(text.replace("from __future__", "#"), "README.md", "exec"), found)  # noqa: S102 (our own README)
    handler = found["Brightness"]()
    handler.load(None, None, None)

    assert handler.postprocess(*handler.infer([handler.preprocess(handler.example())]), None).name == "bright"
