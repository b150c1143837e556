"""What `front_door.yaml` may say: where the front door listens, its certificate, and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.runtime.data import source
from torchserve_dag.runtime.data.plain import WrongFieldError
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.ports import host_and_port

FILE = "front_door.yaml"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may ask of the front door; one more is refused with a status of its own."""

    connections: int = 15_000
    """Open at once, of all clients; fewer where the process may open fewer files."""
    streams: int = 100
    """Requests at once over one HTTP/2 connection."""
    headers_kib: int = 32
    """Of one request."""
    headers_s: float = 10.0
    """From a request's first byte to the last of its headers."""
    body_s: float = 60.0
    """From a request's first byte to its last."""
    idle_s: float = 60.0
    """For a connection without a request."""
    requests_per_second: int = 1000
    """For a token that does not say; over them a request is answered 429."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise WrongFieldError(f"{getattr(self, name)} is not more than 0", name)


@dataclass(frozen=True, slots=True)
class FrontDoor:
    """Where and how the front door listens; REST and gRPC share its one port."""

    listen: str = "127.0.0.1:8443"
    """`0.0.0.0:8443` faces the network."""
    metrics: str = "127.0.0.1:8444"
    """Prometheus's page, without a token: for this machine alone."""
    certificate: str | None = None
    """A file of PEM certificates; without one, a development certificate is made. Read again when it changes."""
    key: str | None = None
    """Its private key, a file of PEM."""
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        for name in ("listen", "metrics"):
            try:
                host_and_port(getattr(self, name))
            except ServerError:
                raise WrongFieldError(f'"{getattr(self, name)}" is not HOST:PORT', name) from None
        host, _ = host_and_port(self.metrics)
        if not (host == "localhost" or host.startswith("127.") or host == "::1"):
            raise WrongFieldError(f"{host} is not this machine's loopback, and metrics need no token", "metrics")
        if (self.certificate is None) != (self.key is None):
            raise WrongFieldError("certificate and key are files that come together", "certificate")


def read(root: Path) -> FrontDoor:
    """The project's settings; the defaults where it has no `front_door.yaml`. Raises CheckError."""
    path = root / FILE
    return source.read(path, FrontDoor).value if path.is_file() else FrontDoor()
