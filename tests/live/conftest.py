"""A real TorchServe on free ports, serving this project's own archives, started once for all tests in here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from torchserve_dag.clients import GrpcClient, RestClient
from torchserve_dag.server.connect import running
from torchserve_dag.server.connect import torchserve_client as client
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.state import State

ROOT = Path(__file__).parents[2]
SERVED = ("detect_classify", "image_classifier", "yolo_detector")

Tool = Callable[..., str]


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
        timeout=170,
        check=False,
    )
    if done.returncode:
        pytest.fail(
            f"torchserve-dag {' '.join(words)} ended with {done.returncode}: {done.stderr or done.stdout}",
            pytrace=False,
        )
    return done.stdout


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project, its archives built into a model store of its own."""
    root = tmp_path_factory.mktemp("project")
    for name in ("handlers", "workflows", "weights", "photos", "config.properties", "log4j2.xml"):
        (root / name).symlink_to(ROOT / name)
    run_tool(root, "build", *SERVED)
    return root


@pytest.fixture(scope="session")
def serving(project: Path) -> Iterator[Serving]:
    run_tool(project, "up", "--free-ports", "--no-front-door")
    yield Serving(project, State(project))
    run_tool(project, "down")


@pytest.fixture(scope="session")
def rest(serving: Serving) -> Iterator[RestClient]:
    with serving.rest() as found:
        yield found


@pytest.fixture(scope="session")
def grpc(serving: Serving) -> Iterator[GrpcClient]:
    with serving.grpc() as found:
        yield found


@pytest.fixture(scope="session")
def photo() -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        folder = ROOT / "photos" if (ROOT / "photos" / name).is_file() else ROOT / "weights/photos"
        return (folder / name).read_bytes()

    return read
