"""What README's demo serves, started as README says: by `./scripts/demo`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.live.conftest import ROOT, Serving
from torchserve_dag.clients import GrpcClient, RestClient
from torchserve_dag.server import ports, properties
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.state import State

Run = Callable[..., str]


@dataclass(frozen=True)
class Demo(Serving):
    printed: str = ""
    """By the first run, which started the server."""


@pytest.fixture(scope="package")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project in a folder of its own, at ports that nobody has, with this environment as its `.venv`."""
    root = tmp_path_factory.mktemp("demo")
    for name in ("handlers", "workflows", "weights", "photos", "pyproject.toml", "constraints.txt"):
        (root / name).symlink_to(ROOT / name)
    (root / "scripts").mkdir()
    for path in (ROOT / "scripts").iterdir():
        (root / "scripts" / path.name).write_bytes(path.read_bytes())
        (root / "scripts" / path.name).chmod(0o755)
    (root / ".venv").symlink_to(sys.prefix)
    (root / "tmp").mkdir()
    listen, metrics = ports.free(["127.0.0.1", "127.0.0.1"])
    (root / "front_door.yaml").write_text(f"listen: 127.0.0.1:{listen}\nmetrics: 127.0.0.1:{metrics}\n")
    where = Addresses().with_free_ports()
    properties.write(ROOT / "config.properties", root / "config.properties", properties.listening_at(where))
    return root


@pytest.fixture(scope="package")
def run(copy: Path) -> Iterator[Run]:
    """Runs a line of shell in the copy, as after `source .venv/bin/activate`; what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in {"JAVA_HOME", "VIRTUAL_ENV", "TS_CONFIG_FILE"}}
    environment |= {"PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(copy / "tmp")}
    environment |= {"COLUMNS": "80", "TERM": "dumb"}

    def line(text: str) -> str:
        words = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(
            words, cwd=copy, env=environment, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    yield line
    line("torchserve-dag down")


@pytest.fixture(scope="package")
def serving(copy: Path, run: Run) -> Demo:
    return Demo(copy, State(copy), printed=run("./scripts/demo"))


@pytest.fixture(scope="package")
def rest(serving: Demo) -> Iterator[RestClient]:
    with serving.rest() as found:
        yield found


@pytest.fixture(scope="package")
def grpc(serving: Demo) -> Iterator[GrpcClient]:
    with serving.grpc() as found:
        yield found
