"""Clients for the host that this project runs, without the front door."""

from __future__ import annotations

from torchserve_dag.clients import GrpcClient, KeyFile, RestClient
from torchserve_dag.clients.address import Protocol
from torchserve_dag.server import processes
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.sockets import SocketTransport
from torchserve_dag.server.state import ServerRecord, State
from torchserve_dag.server.supervised import Role, Supervised

MANAGEMENT = "management.sock"
"""In the direct host's folder: where the keeper answers management calls."""


def running(state: State) -> ServerRecord:
    """The running server of this project. Raises ServerError if there is none, with what follows."""
    record = state.record()
    if record is None or not is_running(state):
        role: Role = "keeper" if record and record.host == "direct" else "TorchServe"
        problem = Supervised(state).problem(role)
        if record and state.serving() and not problem:  # between the end of its program and that of its process
            problem = f"{role} (pid {record.pid}) is ending: torchserve-dag status says what follows."
        raise ServerError(problem or "No server of this project is running: start it with torchserve-dag up.")
    return record


def is_running(state: State) -> bool:
    """Whether the host of this project runs."""
    record = state.record()
    if record and record.host == "direct":
        return Supervised(state).process("keeper") is not None
    return record is not None and processes.java(record, state) is not None


def host_tokens(state: State) -> KeyFile:
    """The host's own tokens, from its key file. Raises ServerError."""
    try:
        return KeyFile.read(state.key_file)
    except (OSError, ValueError):
        raise ServerError(f"{state.key_file} is damaged: stop the server with torchserve-dag down.") from None


def host_client(state: State, protocol: Protocol = "rest", timeout: float = 60.0) -> RestClient | GrpcClient:
    """A client of the host's own ports, on this machine only. Close it, or use `with`. Raises ServerError."""
    where, tokens = running(state).addresses, host_tokens(state)
    kind: type[GrpcClient | RestClient] = GrpcClient if protocol == "grpc" else RestClient
    inference, management = (
        (where.grpc_inference, where.grpc_management) if protocol == "grpc" else (where.inference, where.management)
    )
    return kind(inference, management, token=tokens.inference, management_token=tokens.management, timeout=timeout)


def management_client(state: State, timeout: float = 60.0) -> RestClient:
    """A client for management calls, also while Envoy starts. Close it, or use `with`. Raises ServerError."""
    record, tokens = running(state), host_tokens(state)
    where = record.addresses
    try:
        transport = SocketTransport(state.direct / MANAGEMENT) if record.host == "direct" else None
    except OSError:
        raise ServerError(f"There is no {state.direct}: stop the server with torchserve-dag down.") from None
    return RestClient(
        where.inference,
        where.management,
        token=tokens.inference,
        management_token=tokens.management,
        timeout=timeout,
        transport=transport,
    )
