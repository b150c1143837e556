"""A client of the project's running server, through its front door if it has one."""

from __future__ import annotations

from pathlib import Path

from torchserve_dag.clients import GrpcClient, RestClient
from torchserve_dag.clients.address import Protocol
from torchserve_dag.clients.chat import ChatClient
from torchserve_dag.front_door import certificate
from torchserve_dag.front_door import start as front_door
from torchserve_dag.front_door.door import Door
from torchserve_dag.front_door.settings import FrontDoor
from torchserve_dag.server.connect import host_client, host_tokens, running
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.ports import host_and_port
from torchserve_dag.server.state import State


def client(state: State, protocol: Protocol = "rest", timeout: float = 60.0) -> RestClient | GrpcClient:
    """A client with the server's addresses and tokens. Close it, or use it in a `with`. Raises ServerError."""
    door = Door(state).record()
    if door is None or not door.tls:
        return host_client(state, protocol, timeout)
    kind: type[GrpcClient | RestClient] = GrpcClient if protocol == "grpc" else RestClient
    where, shown = running(state).addresses, Path(door.certificate)
    return kind(
        f"https://{local_address(door.settings)}",
        where.grpc_management if protocol == "grpc" else where.management,
        token=front_door.own_token(state),
        management_token=host_tokens(state).management,
        ca=shown,
        server_name=certificate.subject_name(shown),
        timeout=timeout,
    )


def chat_client(state: State, timeout: float) -> ChatClient:
    """A client of the project's language models, which are behind the front door only. Raises ServerError."""
    running(state)
    door = Door(state).record()
    if door is None or not door.tls:
        raise ServerError("This server has no front door, which chats go through: torchserve-dag up --front-door.")
    shown = Path(door.certificate)
    return ChatClient(
        f"https://{local_address(door.settings)}",
        token=front_door.own_token(state),
        ca=shown,
        server_name=certificate.subject_name(shown),
        timeout=timeout,
    )


def local_address(settings: FrontDoor) -> str:
    """Where the front door is reached from its own machine, as HOST:PORT."""
    host, port = host_and_port(settings.listen)
    own_host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (it is compared)
    return f"[{own_host}]:{port}" if ":" in own_host else f"{own_host}:{port}"
