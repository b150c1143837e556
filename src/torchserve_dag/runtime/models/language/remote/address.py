"""Where the server of the engine `remote` is, and the key for it."""

from __future__ import annotations

import ipaddress
import os
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from torchserve_dag.runtime.models.language.settings import Remote

if TYPE_CHECKING:
    import httpx

LONGEST_CONNECT_S = 10.0


def key_of(variable: str | None) -> str:
    """The key in an environment variable; none where no variable is named. Raises ValueError, without the key."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise ValueError(f"the environment variable {variable}, which `key` names, is not set")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"the environment variable {variable} holds what cannot be sent in a header")
    return key


def address_of(url: str, *, secret: bool) -> str:
    """The API's base address without a slash at its end. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError(f"url: {url} is no address like https://api.example.com/v1")
    if secret and parts.scheme == "http" and not _is_here(parts.hostname):
        raise ValueError(f"url: {url} would show the key on its way; write https")
    return url.rstrip("/")


def _is_here(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def client_of(remote: Remote, key: str, room: int) -> httpx.AsyncClient:
    """Certificates are always verified; no redirect is followed. All waits but that for a connection have their limit
    where they are awaited.
    """
    import httpx  # noqa: PLC0415 (only this engine needs it)

    return httpx.AsyncClient(
        headers={"content-type": "application/json", "accept": "text/event-stream, application/json"}
        | ({"authorization": f"Bearer {key}"} if key else {}),
        timeout=httpx.Timeout(None, connect=min(LONGEST_CONNECT_S, remote.timeout_s / 2)),
        limits=httpx.Limits(max_connections=room, max_keepalive_connections=room),
        follow_redirects=False,
    )
