"""Clients for the TorchServe that this project runs."""

from __future__ import annotations

from torchserve_dag.clients import GrpcClient, KeyFile, RestClient
from torchserve_dag.clients.address import Protocol
from torchserve_dag.server import processes
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State, TorchServeProcess
from torchserve_dag.server.supervised import Supervised


def running(state: State) -> TorchServeProcess:
    """The running TorchServe of this project. Raises ServerError if there is none, with what follows."""
    record = state.record()
    if record is None or processes.java(record, state) is None:
        raise ServerError(
            Supervised(state).problem("TorchServe")
            or "No server of this project is running: start it with torchserve-dag up."
        )
    return record


def torchserve_tokens(state: State) -> KeyFile:
    """TorchServe's own tokens, from its key file. Raises ServerError."""
    try:
        return KeyFile.read(state.key_file)
    except (OSError, ValueError):
        raise ServerError(f"{state.key_file} is damaged: stop the server with torchserve-dag down.") from None


def torchserve_client(state: State, protocol: Protocol = "rest", timeout: float = 60.0) -> RestClient | GrpcClient:
    """A client that bypasses the front door, on this machine only. Close it, or use `with`. Raises ServerError."""
    where, tokens = running(state).addresses, torchserve_tokens(state)
    kind: type[GrpcClient | RestClient] = GrpcClient if protocol == "grpc" else RestClient
    inference, management = (
        (where.grpc_inference, where.grpc_management) if protocol == "grpc" else (where.inference, where.management)
    )
    return kind(inference, management, token=tokens.inference, management_token=tokens.management, timeout=timeout)
