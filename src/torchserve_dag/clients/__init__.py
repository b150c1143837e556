"""Clients for TorchServe: REST and gRPC, plain and asyncio, with the same methods, messages and exceptions."""

from torchserve_dag.clients.client import AsyncClient, Client
from torchserve_dag.clients.errors import (
    ConnectionLost,
    DeadlineExceeded,
    ModelNotFound,
    Overloaded,
    RequestRefused,
    ServerFailed,
    ServingError,
    TlsFailed,
    TooLarge,
    Unauthorized,
    UnexpectedAnswer,
    Unreachable,
)
from torchserve_dag.clients.grpc import AsyncGrpcClient, GrpcClient
from torchserve_dag.clients.key_file import KeyFile
from torchserve_dag.clients.models import ModelInfo, VersionInfo, WorkerInfo
from torchserve_dag.clients.rest import AsyncRestClient, RestClient
from torchserve_dag.runtime.data.options import Options

__all__ = [
    "AsyncClient",
    "AsyncGrpcClient",
    "AsyncRestClient",
    "Client",
    "ConnectionLost",
    "DeadlineExceeded",
    "GrpcClient",
    "KeyFile",
    "ModelInfo",
    "ModelNotFound",
    "Options",
    "Overloaded",
    "RequestRefused",
    "RestClient",
    "ServerFailed",
    "ServingError",
    "TlsFailed",
    "TooLarge",
    "Unauthorized",
    "UnexpectedAnswer",
    "Unreachable",
    "VersionInfo",
    "WorkerInfo",
]
