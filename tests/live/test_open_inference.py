"""Triton's own client calls the direct host by the Open Inference Protocol, from an environment of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.conftest import ROOT, Serving, run_tool
from tests.unit.test_open_inference import png, write_project
from torchserve_dag.clients import KeyFile
from torchserve_dag.server.state import State

TRITON = ROOT / ".venv-triton" / "bin" / "python"
NAMES = ("text", "size", "total", "scored", "seen")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    if not TRITON.exists():
        pytest.fail("The environment of Triton's client is not there; run scripts/setup --triton first.", pytrace=False)
    root = write_project(tmp_path_factory.mktemp("open"), *NAMES)
    (root / "photo.png").write_bytes(png(4, 3))
    run_tool(root, "build")
    run_tool(root, "up", "--host", "direct", "--free-ports", "--no-front-door")
    yield Serving(root, State(root), "direct")
    run_tool(root, "down")


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_tritonclient_calls_it_through_envoy(server: Serving, kind: str) -> None:
    where, key = server.addresses, KeyFile.read(server.state.key_file).inference
    address = where.inference.removeprefix("http://") if kind == "http" else where.grpc_inference
    program, photo = Path(__file__).with_name("triton_calls.py"), server.root / "photo.png"
    words = [TRITON, program, kind, address, photo, key]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    assert [found[name] for name in ("live", "ready", "model ready", "server")] == [True, True, True, "torchserve-dag"]
    assert [one for one in found["inputs"] if one[1] in {"INT64", "BOOL"}] == [["count", "INT64"], ["fast", "BOOL"]]
    assert found["texts"] == {"output": ["A", "Ü"], "id": "42"}
    assert found["version"]["output"] == ["A"]
    assert found["photos"]["output"] == [4, 3, 4, 3]
    assert found["numbers"]["output"] == [3.0, 7.0]
    assert found["halves"]["output"] == [2.5]
    assert [len(json.loads(each)) for each in found["labels"]["labels"]] == [2, 1]
    assert found["fields"] == {"matrix": [0.5, 1.0], "fast": [True], "words": ["a", "b"], "id": "42"}
    wrong, none = ("400", "404") if kind == "http" else ("StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND")
    assert found["bad"] == ["422" if kind == "http" else wrong, "Element 1 of 2, counted from 0: That text is bad."]
    assert found["none"] == [none, "Model not found: none"]
    assert found["wrong"] == [wrong, 'The input "input" is BYTES, not INT64.']
