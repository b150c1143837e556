"""TLS for the clients: which certificates are trusted, and whether a port speaks TLS at all."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchserve_dag.clients.address import Address
from torchserve_dag.clients.errors import unreachable

PROBE_S = 1.0
"""How long a port may take to answer a TLS handshake."""


@dataclass(frozen=True, slots=True)
class Trust:
    """Which certificates a client accepts: those in `pem` or signed by them, any, or those of public authorities."""

    pem: str | None
    insecure: bool

    @classmethod
    def of(cls, ca: Path | str | None, *, insecure: bool) -> Trust:
        """Raises OSError if the file cannot be read, ValueError if it holds no certificate."""
        pem = None if ca is None else Path(ca).read_text("ascii", "replace")
        trust = cls(pem, insecure)
        try:
            trust.context()
        except ssl.SSLError:
            raise ValueError(f"{ca} holds no certificate; give a file of PEM certificates") from None
        return trust

    def context(self) -> ssl.SSLContext | bool:
        """The `verify` of httpx; True means its own list of public authorities."""
        if self.insecure:
            return _accepting_all()
        if self.pem is None:
            return True
        context = ssl.create_default_context(cadata=self.pem)
        context.verify_flags |= (
            ssl.VERIFY_X509_PARTIAL_CHAIN
        )  # the file may hold the server's own certificate instead of its issuer's
        return context


def shown_by(address: Address) -> tuple[str, str]:
    """A server's certificate and a name that it is for. gRPC needs both to accept an unknown certificate.

    Raises Unreachable.
    """
    try:
        pem = ssl.get_server_certificate((address.host or "", address.port), timeout=PROBE_S)
        context = ssl.create_default_context(cadata=pem)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        with _handshake(address, context) as connection:  # Python reads a certificate's names only once it is verified
            found = connection.getpeercert() or {}
    except OSError as error:  # SSLError is an OSError
        raise unreachable(address, error) from None
    names: dict[Any, Any] = dict(found.get("subjectAltName", ()))  # type: ignore[arg-type]
    name = names.get("DNS") or names.get("IP Address") or address.host
    return pem, str(name).replace("*", "any")


def answers_in_tls(address: Address) -> bool:
    """Whether a TLS handshake with a port succeeds, whatever certificate it shows."""
    if address.host is None:
        return False
    try:
        _handshake(address, _accepting_all()).close()
    except OSError:  # SSLError is an OSError
        return False
    return True


def _handshake(address: Address, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection((address.host or "", address.port), PROBE_S)
    try:
        return context.wrap_socket(plain, server_hostname=address.host)
    except BaseException:
        plain.close()
        raise


def _accepting_all() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
