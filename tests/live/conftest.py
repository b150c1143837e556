"""Real servers on free ports. A folder's test files share one server; a file that stands beside them has its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from torchserve_dag.clients import GrpcClient, RestClient
from torchserve_dag.server.connect import running
from torchserve_dag.server.connect import torchserve_client as client
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.state import State

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Serving:
    """A running server and the project that it serves."""

    root: Path
    state: State

    @property
    def addresses(self) -> Addresses:
        return running(self.state).addresses

    def rest(self) -> RestClient:
        found = client(self.state, "rest")
        assert isinstance(found, RestClient)
        return found

    def grpc(self) -> GrpcClient:
        found = client(self.state, "grpc")
        assert isinstance(found, GrpcClient)
        return found


def run_tool(root: Path, *words: str) -> str:
    """`torchserve-dag WORDS` in a project, as a user would; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "torchserve_dag", *words],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    if done.returncode:
        pytest.fail(
            f"torchserve-dag {' '.join(words)} ended with {done.returncode}: {done.stderr or done.stdout}",
            pytrace=False,
        )
    return done.stdout


@pytest.fixture(scope="session")
def photo() -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        folder = ROOT / "photos" if (ROOT / "photos" / name).is_file() else ROOT / "weights/photos"
        return (folder / name).read_bytes()

    return read
