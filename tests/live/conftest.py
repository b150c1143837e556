"""Real servers on free ports. A folder's test files share one server; a file that stands beside them has its own."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from torchserve_dag.clients import GrpcClient, RestClient
from torchserve_dag.server import ports
from torchserve_dag.server.connect import host_client as client
from torchserve_dag.server.connect import running
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.state import Host, State

ROOT = Path(__file__).parents[2]

HOSTS: tuple[Host, ...] = ("torchserve", "direct")
on_torchserve = pytest.mark.parametrize("server", ["torchserve"], indirect=True)
on_direct = pytest.mark.parametrize("server", ["direct"], indirect=True)
"""Which hosts a test is about, where a folder's tests run on both: docs/hosts.md names the differences."""


@dataclass(frozen=True)
class Serving:
    """A running server and the project that it serves."""

    root: Path
    state: State
    host: Host = "torchserve"

    def log(self, name: str, version: str = "1.0") -> str:
        """What the workers of a version wrote."""
        path = self.state.logs / ("model_log.log" if self.host == "torchserve" else f"worker@{name}@{version}.log")
        return path.read_text("utf-8")

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


def serve_files(request: pytest.FixtureRequest, root: Path, host: Host, *words: str) -> Iterator[Serving]:
    """Serve what FILES says in each of the folder's test files; of those from which no test was chosen, nothing. For a
    fixture of a module, only what its own says.

    A path in FILES is copied. GRPC in a file stands for the address of the server itself. TorchServe gives a worker two minutes to start, and all
    of them start at once: a dozen for each server is enough.
    """
    alone = request.scope == "module"
    for folder in ("handlers", "workflows", "model_store"):
        (root / folder).mkdir()
    rest = _free_ports()
    grpc = rest + 3
    for module in {item.getparent(pytest.Module) for item in request.session.items}:
        if module and (module.path == request.path if alone else module.path.parent == request.path.parent):
            for name, text in module.obj.FILES.items():
                assert not (root / name).exists(), f"two test files have a {name}"
                if isinstance(text, Path):
                    shutil.copy(text, root / name)
                else:
                    (root / name).write_text(textwrap.dedent(text).replace("GRPC", f"127.0.0.1:{grpc}"))
    yield from _serve(root, rest, host, *words)


def serve_project(root: Path, host: Host, models: Sequence[str]) -> Iterator[Serving]:
    """Serve these models of a project, on free ports."""
    yield from _serve(root, _free_ports(), host, models=models)


def _free_ports() -> int:
    """The first of five. Others may look at the same time."""
    return ports.free_run("127.0.0.1", 5, start=random.randrange(10_000, 30_000))


def _serve(root: Path, rest: int, host: Host, *words: str, models: Sequence[str] = ()) -> Iterator[Serving]:
    (root / "model_store").mkdir(exist_ok=True)
    for name in ("config.properties", "log4j2.xml"):
        shutil.copy(ROOT / name, root)
    listen, metrics = ports.free(["127.0.0.1", "127.0.0.1"])
    (root / "front_door.yaml").write_text(f"listen: 127.0.0.1:{listen}\nmetrics: 127.0.0.1:{metrics}\n")
    run_tool(root, "build", *models)
    try:
        run_tool(root, "up", "--port", str(rest), "--grpc-port", str(rest + 3), "--host", host, *words)
        yield Serving(root, State(root), host)
    finally:
        run_tool(root, "down")


@pytest.fixture(scope="session")
def photo() -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        folder = ROOT / "photos" if (ROOT / "photos" / name).is_file() else ROOT / "weights/photos"
        return (folder / name).read_bytes()

    return read
