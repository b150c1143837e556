"""A client of the project's running server, through its front door where it has one."""

from __future__ import annotations

from pathlib import Path

import httpx
from grpc import ssl_channel_credentials as grpc_credentials

from torchserve_dag.clients import GrpcClient, RestClient
from torchserve_dag.clients.rest import LIMITS
from torchserve_dag.front_door import certificate
from torchserve_dag.front_door import start as front_door
from torchserve_dag.front_door.door import Door
from torchserve_dag.front_door.settings import FrontDoor
from torchserve_dag.server.connect import Protocol, running, torchserve_client, torchserve_tokens
from torchserve_dag.server.ports import host_and_port
from torchserve_dag.server.state import State


def client(state: State, protocol: Protocol = "rest", timeout: float = 60.0) -> RestClient | GrpcClient:
    """A client with the server's addresses and tokens, through its front door where it has one.

    Close it, or use it in a `with`. Raises ServerError.
    """
    door = Door(state).record()
    if door is None:
        return torchserve_client(state, protocol, timeout)
    where, management_token = running(state).addresses, torchserve_tokens(state).management
    address, token = local_address(door.settings), front_door.own_token(state)
    if protocol == "grpc":
        shown = Path(door.certificate)
        credentials, name = grpc_credentials(shown.read_bytes()), certificate.a_name(shown)
        return GrpcClient(
            address,
            where.grpc_management,
            token=token,
            management_token=management_token,
            timeout=timeout,
            credentials=credentials,
            server_name=name,
        )
    return RestClient(
        f"https://{address}",
        where.management,
        token=token,
        management_token=management_token,
        timeout=timeout,
        transport=httpx.HTTPTransport(verify=certificate.trust(Path(door.certificate)), limits=LIMITS, trust_env=False),
    )


def local_address(settings: FrontDoor) -> str:
    """The front door's address for this machine."""
    host, port = host_and_port(settings.listen)
    return f"{'127.0.0.1' if host in {'0.0.0.0', '::'} else host}:{port}"  # noqa: S104 (it is compared)
