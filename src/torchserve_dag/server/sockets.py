"""HTTP over a Unix socket whose path may be too long for one."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
from pathlib import Path

import httpx


class SocketTransport(httpx.HTTPTransport):
    """Connects to a socket by the descriptor of its folder, so that the length of the path does not matter."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if there is no such folder."""
        self._folder = os.open(path.parent, os.O_PATH)
        # httpx would read the list of all authorities, which takes 30 ms, for a socket without TLS.
        nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        super().__init__(verify=nobody, uds=f"/proc/self/fd/{self._folder}/{path.name}")

    def close(self) -> None:
        super().close()
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1


class SocketConnection(http.client.HTTPConnection):
    """The same for the standard library's client, which the keeper asks its workers with, ten times a second."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._socket_path = path

    def connect(self) -> None:
        folder = os.open(self._socket_path.parent, os.O_PATH)
        try:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(self.timeout)
            self.sock.connect(f"/proc/self/fd/{folder}/{self._socket_path.name}")
        finally:
            os.close(folder)
