"""Clients for the server that this project runs."""

from __future__ import annotations

from typing import Literal

from torchserve_dag.clients import GrpcClient, RestClient, Tokens
from torchserve_dag.server import processes
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import Record, State

Protocol = Literal["rest", "grpc"]


def running(state: State) -> Record:
    """The server that runs. Raises ServerError where none does."""
    record = state.record()
    if record is None or processes.java(record, state) is None:
        raise ServerError("No server of this project is running: start it with torchserve-dag up.")
    return record


def client(state: State, protocol: Protocol = "rest", timeout: float = 60.0) -> RestClient | GrpcClient:
    """A client with the server's addresses and tokens; close it, or use it in a `with`. Raises ServerError."""
    where = running(state).addresses
    try:
        tokens = Tokens.read(state.key_file)
    except (OSError, ValueError):
        raise ServerError(f"{state.key_file} is damaged: stop the server with torchserve-dag down.") from None
    if protocol == "grpc":
        return GrpcClient(
            where.grpc_inference,
            where.grpc_management,
            token=tokens.inference,
            management_token=tokens.management,
            timeout=timeout,
        )
    return RestClient(
        where.inference, where.management, token=tokens.inference, management_token=tokens.management, timeout=timeout
    )
