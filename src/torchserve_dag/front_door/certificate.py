"""The front door's TLS certificate: the configured files, or a generated development certificate."""

from __future__ import annotations

import datetime as dt
import ipaddress
import socket
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from torchserve_dag.archives import atomic
from torchserve_dag.front_door.settings import FrontDoor
from torchserve_dag.server.errors import ServerError

LIFE = dt.timedelta(days=365)
RENEW = dt.timedelta(days=30)
"""How long before its expiry a development certificate is renewed."""


def files(root: Path, door: FrontDoor, folder: Path) -> tuple[Path, Path]:
    """The files of the certificate and its key. Raises ServerError if they are missing or do not match."""
    if door.certificate is None or door.key is None:
        certificate, key = folder / "development.pem", folder / "development.key"
        if not _good(certificate):
            _make(certificate, key)
        return certificate, key
    certificate, key = (root / door.certificate).absolute(), (root / door.key).absolute()
    asked = []

    def no_passphrase() -> str:
        asked.append(key)
        return ""

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, no_passphrase)
    except OSError as error:  # SSLError is an OSError
        if asked:
            raise ServerError(
                f"{door.key} of front_door.yaml has a passphrase, which nobody can type at a server: write the key "
                "without it, readable by the server's user only (openssl pkey -in KEY -out NEW)."
            ) from None
        raise ServerError(
            f"{door.certificate} and {door.key} of front_door.yaml are not a matching certificate and key "
            f"({error.strerror or error}): name PEM files."
        ) from None
    return certificate, key


def subject_name(certificate: Path) -> str:
    """A name or an address that the certificate was issued for. Raises ServerError if it names none."""
    parsed = x509.load_pem_x509_certificate(certificate.read_bytes())
    try:
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    hosts = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    if not hosts:
        raise ServerError(f"{certificate} names no host (subjectAltName), so no client accepts it: issue it with one.")
    return hosts[0].replace("*", "any")


def _good(certificate: Path) -> bool:
    try:
        parsed = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError):
        return False
    return parsed.not_valid_after_utc > dt.datetime.now(dt.timezone.utc) + RENEW


def _make(certificate: Path, key_file: Path) -> None:
    """Write a self-signed certificate for localhost and this machine's name."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "torchserve-dag development")])
    hosts: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.DNSName(socket.gethostname())]
    hosts += [x509.IPAddress(ipaddress.ip_address(one)) for one in ("127.0.0.1", "::1")]
    now = dt.datetime.now(dt.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + LIFE)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    atomic.write_private(key_file, key.private_bytes(pem, pkcs8, serialization.NoEncryption()).decode())
    atomic.write_text(certificate, made.public_bytes(pem).decode())
