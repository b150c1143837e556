"""A server's address, as people write it: `https://host:8443`; over gRPC `host:7070` as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

Protocol = Literal["rest", "grpc"]
MAX_PORT = 65535
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a client connects to, and whether it encrypts."""

    text: str
    """The address as the caller wrote it, without a slash at its end."""
    tls: bool
    target: str
    """The target of a gRPC channel: `HOST:PORT`, or another form of gRPC's, like `unix:/run/socket`."""
    host: str | None
    """None for a form that only gRPC understands."""
    port: int

    def __str__(self) -> str:
        return self.text


def parse(text: str, protocol: Protocol, *, tls: bool) -> Address:
    """Parse an address. Over gRPC, `tls` decides if it has no http:// or https://. Raises ValueError."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is not a number, a bracket that is not closed
        raise _refused(text, protocol) from None
    if parts.scheme in _PORTS and host and (port is None or port <= MAX_PORT):
        port = port or _PORTS[parts.scheme]
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return Address(text.rstrip("/"), parts.scheme == "https", target, host, port)
    if protocol == "rest" or not text or parts.scheme in _PORTS:
        raise _refused(text, protocol)
    name, _, number = text.rpartition(":")
    known = bool(name) and number.isdigit() and "/" not in name
    return Address(text, tls, text, name.strip("[]") if known else None, int(number) if known else 0)


def _refused(text: str, protocol: Protocol) -> ValueError:
    forms = "http://HOST:PORT or https://HOST:PORT" if protocol == "rest" else "https://HOST:PORT, or HOST:PORT"
    return ValueError(f'"{text}" is not an address; write {forms}')
