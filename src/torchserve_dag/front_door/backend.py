"""Who answers behind Envoy: TorchServe, or the direct host's workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchserve_dag.server.ports import Addresses, host_and_port

Resource = dict[str, Any]
GATEWAY, MODELS = "../gateway/gateway.sock", "../gateway/models.sock"
"""Relative to Envoy's folder: where the gateway answers, and where Envoy answers the gateway."""
MANAGEMENT = "../direct/management.sock"
"""Where the direct host's keeper answers, relative to Envoy's folder."""


@dataclass(frozen=True, slots=True)
class Backend:
    """Who answers behind Envoy: TorchServe, or the direct host's workers."""

    torchserve: Addresses
    token: str = ""
    """TorchServe's inference token."""
    sockets: Mapping[str, Sequence[str]] | None = None
    """Of the direct host: for each version by its name, its workers' sockets, relative to Envoy's folder. None for
    TorchServe."""

    @property
    def direct(self) -> bool:
        return self.sockets is not None

    def endpoints(self, protocol: str, version: str | None) -> list[Resource]:
        """Where requests for a version go; None for those to the host itself."""
        if self.sockets is not None:
            paths = [MANAGEMENT] if version is None else self.sockets.get(version, ())
            addresses: list[Resource] = [{"pipe": {"path": path}} for path in paths]
        else:
            where = self.torchserve.inference if protocol == "rest" else self.torchserve.grpc_inference
            host, port = host_and_port(where)
            addresses = [{"socket_address": {"address": host, "port_value": port}}]
        return [{"endpoint": {"address": address}} for address in addresses]

    @property
    def authorization(self) -> list[Resource]:
        """The header with TorchServe's token, for what Envoy itself asks the host."""
        return [] if self.direct else [overwrite("authorization", f"Bearer {self.token}")]


def overwrite(name: str, value: str) -> Resource:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
