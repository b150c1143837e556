"""One server, with a front door, for the small workflows of all test files in this folder."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.conftest import Serving, run_tool
from tests.live.door import new_project
from torchserve_dag.server import ports
from torchserve_dag.server.state import State


@pytest.fixture(scope="package")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Serves what the FILES of the chosen test files say; GRPC in them stands for the server's own address."""
    root = tmp_path_factory.mktemp("workflows")
    new_project(root)
    (root / "handlers").mkdir()
    rest, grpc = ports.free_run("127.0.0.1", 3, start=21_000), ports.free_run("127.0.0.1", 2, start=22_000)
    listen, metrics = ports.free(["127.0.0.1", "127.0.0.1"])
    (root / "front_door.yaml").write_text(f"listen: 127.0.0.1:{listen}\nmetrics: 127.0.0.1:{metrics}\n")
    modules = {item.getparent(pytest.Module) for item in request.session.items}
    for module in modules:
        if module and module.path.parent == Path(__file__).parent:
            for name, text in module.obj.FILES.items():
                assert not (root / name).exists(), f"two test files have a {name}"
                (root / name).write_text(textwrap.dedent(text).replace("GRPC", f"127.0.0.1:{grpc}"))
    run_tool(root, "build")
    run_tool(root, "up", "--port", str(rest), "--grpc-port", str(grpc))
    yield Serving(root, State(root))
    run_tool(root, "down")
