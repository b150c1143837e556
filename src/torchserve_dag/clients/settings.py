"""The settings of every client: addresses, tokens, trusted certificates, time limits."""

from __future__ import annotations

import ssl
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

from torchserve_dag.clients import tls
from torchserve_dag.clients.address import Address, Protocol, parse
from torchserve_dag.clients.deadline import Deadline
from torchserve_dag.clients.errors import ConnectionLost, ServingError, Unreachable, plain_to_tls
from torchserve_dag.clients.flows import Call, Cancel, Feedback, Ping, Predict

TORCHSERVE: dict[Protocol, tuple[str, str]] = {
    "rest": ("http://127.0.0.1:8080", "http://127.0.0.1:8081"),
    "grpc": ("127.0.0.1:7070", "127.0.0.1:7071"),
}
"""The inference and management addresses of a TorchServe on this machine, with its default ports."""


class Port(NamedTuple):
    """A port of the server, with the header (over gRPC: the metadata) that carries its token."""

    address: Address
    authorization: dict[str, str]


@dataclass(eq=False)
class Settings:
    """Every client has these parameters. Raises ValueError for addresses and files that cannot work, OSError for a
    `ca` that cannot be read.
    """

    protocol: ClassVar[Protocol]

    server: str | None = None
    """The front door's address, `https://HOST:8443`, for REST and gRPC alike; or TorchServe's own inference port, on
    its machine alone. Without it: TorchServe's default port on this machine."""
    management: str | None = None
    """TorchServe's management address, for `models`, `describe`, `register` and the like: the front door passes none
    of these calls on."""
    _: KW_ONLY
    token: str | None = field(default=None, repr=False)
    """The front door's (`torchserve-dag token new`), or TorchServe's inference token."""
    management_token: str | None = field(default=None, repr=False)
    ca: Path | str | None = None
    """A PEM file with the certificates to trust, for a server whose certificate no public authority has signed."""
    insecure: bool = False
    """Accept any certificate: the connection is encrypted, but nothing proves who answers."""
    server_name: str | None = None
    """The name that the server's certificate was issued for, where that is not the host of its address."""
    timeout: float = 30.0
    """Seconds for a whole call, its retries and pauses included."""
    retries: int = 2
    """How often a call that cannot have been served is sent again."""

    def __post_init__(self) -> None:
        if self.timeout <= 0 or self.retries < 0:
            what = f"timeout is more than 0 and retries at least 0, not {self.timeout} and {self.retries}"
            raise ValueError(what)
        if self.ca is not None and self.insecure:
            raise ValueError("give ca or insecure, not both: with insecure any certificate is accepted")
        here, management_here = TORCHSERVE[self.protocol]
        verified = self.ca is not None or self.insecure
        self._inference = parse(self.server or here, self.protocol, tls=verified)
        management = self.management or (None if self.server else management_here)
        self._management = parse(management, self.protocol, tls=False) if management else None
        if verified and not self._inference.tls:
            raise ValueError(f"{self._inference} is not encrypted, so ca and insecure have no meaning: write https://…")
        self._trust = tls.Trust.of(self.ca, insecure=self.insecure)

    def _verify(self) -> ssl.SSLContext | bool:
        """The `verify` of httpx. Only encrypted connections load the list of authorities, which takes time."""
        encrypted = self._inference.tls or (self._management is not None and self._management.tls)
        return self._trust.context() if encrypted else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def _port(self, call: Call) -> Port:
        """Raises ValueError for a management call without a management address."""
        if isinstance(call, Predict | Cancel | Ping | Feedback):
            return Port(self._inference, bearer(self.token))
        if self._management is None:
            raise ValueError(
                f"{self._inference} answers predictions only; models are described and managed at TorchServe's "
                f'management address, on its own machine: give the client management="{TORCHSERVE[self.protocol][1]}"'
            )
        return Port(self._management, bearer(self.management_token))

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline(self.timeout if timeout is None else timeout)

    def _explained(self, call: Call, error: ServingError) -> ServingError:
        """The error of a failed connection; TlsFailed if the port speaks TLS and the client does not.

        It probes the port, for up to a second: a TLS port's reply to an unencrypted request does not tell.
        """
        address = self._port(call).address
        failed = isinstance(error, Unreachable | ConnectionLost) and not address.tls
        return plain_to_tls(address) if failed and tls.answers_in_tls(address) else error


def bearer(token: str | None) -> dict[str, str]:
    """The header, or gRPC's metadata, that carries a token."""
    return {"authorization": f"Bearer {token}"} if token else {}
