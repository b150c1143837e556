"""The five addresses of TorchServe; whether a port is free, and which process uses it."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from urllib.parse import urlsplit

import psutil

from torchserve_dag.server.errors import ServerError


@dataclass(frozen=True, slots=True)
class Addresses:
    """The addresses at which TorchServe listens."""

    inference: str = "http://127.0.0.1:8080"
    management: str = "http://127.0.0.1:8081"
    metrics: str = "http://127.0.0.1:8082"
    grpc_inference: str = "127.0.0.1:7070"
    grpc_management: str = "127.0.0.1:7071"

    def with_ports(self, rest: int | None, grpc: int | None) -> Addresses:
        """REST at port `rest`, management and metrics at the next two; gRPC at `grpc`, its management next."""
        moved = self
        if rest is not None:
            for i, name in enumerate(("inference", "management", "metrics")):
                moved = replace(moved, **{name: _with_port(getattr(self, name), rest + i)})
        if grpc is not None:
            for i, name in enumerate(("grpc_inference", "grpc_management")):
                moved = replace(moved, **{name: _with_port(getattr(self, name), grpc + i)})
        return moved

    def with_free_ports(self) -> Addresses:
        """The same hosts with free ports."""
        names = [field.name for field in fields(self)]
        ports = free([host_and_port(getattr(self, name))[0] for name in names])
        return replace(self, **{n: _with_port(getattr(self, n), p) for n, p in zip(names, ports, strict=True)})

    def check_free(self) -> None:
        """Raises ServerError that names the owner of a port that is in use."""
        for field in fields(self):
            host, port = host_and_port(getattr(self, field.name))
            option = "--grpc-port" if field.name.startswith("grpc") else "--port"
            problem = why_not(host, port)
            if problem:
                raise ServerError(f"{problem}: choose another with {option}, or any with --free-ports.")


def host_and_port(address: str) -> tuple[str, int]:
    """Split `http://127.0.0.1:8080` or `127.0.0.1:7070` into host and port. Raises ServerError.

    `localhost` is 127.0.0.1: neither TorchServe's gRPC nor Envoy listens at a name.
    """
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        if parts.hostname and parts.port:
            return "127.0.0.1" if parts.hostname == "localhost" else parts.hostname, parts.port
    except ValueError:
        pass
    raise ServerError(f"{address} in config.properties is not an address with a port, like http://127.0.0.1:8080.")


def free(hosts: list[str]) -> list[int]:
    """A free port for each host, all different."""
    with ExitStack() as held:
        sockets = [held.enter_context(_bound(host, 0)) for host in hosts]
        return [int(s.getsockname()[1]) for s in sockets]


def free_run(host: str, length: int, start: int = 9000) -> int:
    """The first of `length` free ports in a row, `start` or later. Raises ServerError."""
    for first in range(start, 60_000, length):
        if all(why_not(host, port) is None for port in range(first, first + length)):
            return first
    raise ServerError(f"There are no {length} consecutive free ports on {host}: end the processes that use them.")


def why_not(host: str, port: int) -> str | None:
    """Why a port is not available, and which process uses it; None if it is available."""
    try:
        _bound(host, port).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"port {port} is in use{_owner(port)}"
        return f"port {port} of {host} cannot be used ({error.strerror})"
    return None


def _bound(host: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Java does: a port in TIME_WAIT is free
        bound.bind((host, port))
        bound.listen(1)
    except OSError:
        bound.close()
        raise
    return bound


def _owner(port: int) -> str:
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:  # some systems show only the user's own connections
        return ""
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            try:
                return f" by pid {connection.pid} ({psutil.Process(connection.pid).name()})"
            except psutil.Error:
                return f" by pid {connection.pid}"
    return ""


def _with_port(address: str, port: int) -> str:
    if not 0 < port < 65_535:  # noqa: PLR2004 (TorchServe's Java refuses 65535)
        raise ServerError(f"{port} is not a port: choose one from 1 to 65534.")
    return f"{address.rpartition(':')[0]}:{port}"
