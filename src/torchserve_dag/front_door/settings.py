"""`front_door.yaml`: where the front door listens, its certificate, and its limits."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.runtime.data import source
from torchserve_dag.runtime.data.loopback import is_loopback
from torchserve_dag.runtime.messages import WrongFieldError
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.ports import host_and_port

FILE = "front_door.yaml"
MAX_HEADERS = 100


@dataclass(frozen=True, slots=True)
class Limits:
    """What the front door accepts."""

    connections: int = 15_000
    """Open connections of all clients; fewer if the process may open fewer files: all of these but 1,024, or half."""
    streams: int = 100
    """Concurrent requests over one HTTP/2 connection."""
    headers_kib: int = 32
    """Size of a request's headers, in KiB; at most 100 headers. Beyond it, 431."""
    headers_s: float = 10.0
    """Seconds from a request's first byte to its last header, and for the TLS handshake. Then 408."""
    body_s: float = 60.0
    """Seconds from a request's first byte to its last. Then 408."""
    idle_s: float = 60.0
    """Seconds after which a connection without a request is closed."""
    requests_per_second: int = 1000
    """Rate limit of a token that was made without `--rate`. Beyond it, 429 with `Retry-After`."""
    requests: int = 1024
    """Concurrent requests of one version over REST, and as many over gRPC. Beyond it, 503 with `Retry-After`."""
    streamed: int = 64
    """The same of a version that answers in chunks: each answer may be waiting for a client that does not read it."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise WrongFieldError(f"{getattr(self, name)} is not more than 0", name)


@dataclass(frozen=True, slots=True)
class FrontDoor:
    """Where and how the front door listens; REST and gRPC share its one port."""

    listen: str = "127.0.0.1:8443"
    """The address of REST and gRPC, `HOST:PORT`. `0.0.0.0:8443` faces the network."""
    metrics: str = "127.0.0.1:8444"
    """The address of Envoy's own metrics, at `/metrics`. Loopback only, because they need no token."""
    certificate: str | None = None
    """A PEM file with the certificate chain. Without it, `up` makes a development certificate. New connections use a
    renewed file within a second."""
    key: str | None = None
    """A PEM file with the certificate's private key."""
    limits: Limits = Limits()
    """What the front door accepts."""

    def __post_init__(self) -> None:
        for name in ("listen", "metrics"):
            try:
                host, _ = host_and_port(getattr(self, name))
                ipaddress.ip_address(host)
            except (ServerError, ValueError):
                what = f'"{getattr(self, name)}" is not HOST:PORT with an address or localhost as HOST'
                raise WrongFieldError(what, name) from None
        host, _ = host_and_port(self.metrics)
        if not is_loopback(host):
            raise WrongFieldError(f"{host} is not this machine's loopback, and metrics need no token", "metrics")
        if (self.certificate is None) != (self.key is None):
            raise WrongFieldError("certificate and key are given together", "certificate")


def read(root: Path) -> FrontDoor:
    """The project's settings; the defaults without a `front_door.yaml`. Raises CheckError."""
    path = root / FILE
    return source.read(path, FrontDoor).value if path.is_file() else FrontDoor()
