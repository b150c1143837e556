"""Envoy's admin interface, over a Unix socket in its folder that only the owner may use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from torchserve_dag.front_door.bootstrap import ADMIN
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.sockets import SocketTransport

TIMEOUT_S = 10.0


class Admin:
    """A client of Envoy's admin interface."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def listens(self) -> bool:
        """Whether Envoy has its routes and clusters, and listens."""
        try:
            return self._ask("GET", "/ready") == "LIVE\n"
        except ServerError:
            return False

    def versions(self) -> dict[str, str]:
        """The version of the clusters and routes that Envoy has accepted, by resource type."""
        text = self._ask("GET", "/stats?filter=version_text")
        lines = (line.partition(": ") for line in text.splitlines())
        return {name.split(".")[-2]: value.strip('"') for name, _, value in lines}

    def stats(self, regex: str) -> dict[str, int]:
        """The counters and gauges whose names match."""
        lines = self._ask("GET", f"/stats?type=All&filter={quote(regex)}").splitlines()
        pairs = (line.rpartition(": ") for line in lines)
        return {name: int(value) for name, _, value in pairs if value.isdigit()}

    def prometheus(self, regex: str) -> str:
        """The metrics whose names match, in Prometheus's text format."""
        return self._ask("GET", f"/stats/prometheus?filter={quote(regex)}")

    def clusters(self) -> list[dict[str, Any]]:
        """The clusters, with the state of their hosts."""
        found = json.loads(self._ask("GET", "/clusters?format=json"))["cluster_statuses"]
        return list(found)

    def post(self, path: str) -> None:
        self._ask("POST", path)

    def _ask(self, method: str, path: str) -> str:
        try:
            with self._client() as client:
                answer = client.request(method, f"http://envoy{path}")
        except httpx.HTTPError as error:
            raise ServerError(f"The front door does not answer ({type(error).__name__}): is it up?") from None
        if not answer.is_success and path != "/ready":
            raise ServerError(f"The front door answered {answer.status_code} to {path}: {answer.text[:200].strip()}")
        return answer.text

    def _client(self) -> httpx.Client:
        try:
            transport = SocketTransport(self.folder / ADMIN)
        except OSError:
            raise ServerError(f"There is no front door in {self.folder}.") from None
        return httpx.Client(transport=transport, timeout=TIMEOUT_S, trust_env=False)
