"""A project of small workflows behind a real front door, for the tests of it."""

from __future__ import annotations

import json
import re
import shutil
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from tests.live.conftest import ROOT
from torchserve_dag.clients import GrpcClient, Options, RestClient
from torchserve_dag.commands import app
from torchserve_dag.front_door.door import Door
from torchserve_dag.releases import manual
from torchserve_dag.server.connect import running
from torchserve_dag.server.state import State
from torchserve_dag.stack import connect

PROTOCOLS = ("rest", "grpc")
SEEN = re.compile(r'^ts_inference_requests_total\{.*model_name="echo",model_version="1\.0".*\} (\S+)$', re.MULTILINE)


def new_project(root: Path) -> None:
    """With what every project has."""
    (root / "workflows").mkdir()
    for name in ("config.properties", "log4j2.xml"):
        shutil.copy(ROOT / name, root)


def write_version(root: Path, name: str, version: str, function: str, code: str, more: str = "") -> None:
    """A workflow of one function, in a file of its own."""
    (root / "workflows" / f"{name}-{version}.yaml").write_text(
        f'name: {name}\nversion: "{version}"\ndoes: A test.\ncode: {code}\nnodes:\n'
        f"  answer: {{function: {function}, inputs: {{text: request}}}}\noutput: answer\nserve: {{batch: 16{more}}}\n"
    )


@dataclass(frozen=True)
class Served:
    root: Path

    @property
    def state(self) -> State:
        return State(self.root)

    @property
    def door(self) -> Door:
        return Door(self.state)

    @property
    def address(self) -> str:
        record = self.door.record()
        assert record
        return connect.local_address(record.settings)

    def client(self, protocol: str) -> RestClient | GrpcClient:
        return connect.client(self.state, protocol)  # type: ignore[arg-type]

    def http(self, token: str | None = None, **more: Any) -> httpx.Client:
        """A plain client, as anybody's."""
        record = self.door.record()
        assert record
        headers = {"authorization": f"Bearer {token or (self.state.front_door / 'own_token').read_text()}"}
        trust = ssl.create_default_context(cafile=record.certificate)
        return httpx.Client(base_url=f"https://{self.address}", verify=trust, headers=headers, timeout=30, **more)

    def route(self, text: str) -> None:
        (self.root / "routes.yaml").write_text(text)
        manual.reload_routes(self.root)

    def seen(self, at_least: int = 0) -> int:
        """How many requests for echo/1.0 TorchServe has counted."""
        where, deadline = running(self.state).addresses.metrics, time.monotonic() + 60
        while True:
            text = httpx.get(f"{where}/metrics", trust_env=False).text
            found = sum(int(float(count)) for count in SEEN.findall(text))
            if found >= at_least or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def log(self, request_id: str) -> dict[str, Any]:
        """Its line in the log, which is written within half a second."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for line in (self.state.logs / "requests.log").read_text().splitlines():
                if f'"{request_id}"' in line:
                    return json.loads(line)  # type: ignore[no-any-return]
            time.sleep(0.1)
        pytest.fail(f"{request_id} is not in requests.log")


def tool(root: Path, *words: str, code: int = 0) -> str:
    """`torchserve-dag WORDS` in this process, which saves a second; what it printed, or what it complained of."""
    found = CliRunner().invoke(app, [*words, "--project", str(root)])
    assert found.exit_code == code, found.output
    return found.stderr if code else found.stdout


def ask(client: Any, name: str = "echo", version: str | None = None, text: bytes = b"hi", **route_by: str) -> str:
    """Which version answered."""
    options = Options(route_by={key.replace("_", "-"): value for key, value in route_by.items()})
    return str(client.predict(name, text, version, options=options)["text"])
