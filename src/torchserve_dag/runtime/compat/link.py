"""The socket between a worker and the process of an unedited handler: each message with its kind and its length.

Both ends import this file, and the handler's end must start quickly: only the standard library.
"""

from __future__ import annotations

import socket
import struct
import time

SETTINGS = b"S"
"""To the process, as JSON: what it loads."""
LOADED, FAILED = b"L", b"F"
"""From the process: the handler is loaded, or why it cannot be."""
BATCH = b"B"
"""To the process: a batch, as TorchServe sends it (wire.py)."""
CHUNK, ANSWER = b"C", b"A"
"""From the process: chunks of the batch's answers, and the answers, as TorchServe's workers send them (wire.py)."""
FAULT = "\nfault "
"""Between the sentence of a batch that failed and the name of its fault in the log."""

_HEAD = struct.Struct("!cQ")
_SMALL = 1 << 16


def send(link: socket.socket, kind: bytes, message: bytes = b"", within_s: float | None = None) -> None:
    """Send a message. Raises TimeoutError, OSError."""
    link.settimeout(within_s)
    head = _HEAD.pack(kind, len(message))
    if len(message) < _SMALL:
        link.sendall(head + message)
    else:  # not copied
        link.sendall(head)
        link.sendall(message)


def receive(link: socket.socket, within_s: float | None = None) -> tuple[bytes, bytearray] | None:
    """The next message and its kind; None where the other end is closed. Raises TimeoutError, OSError."""
    end = None if within_s is None else time.monotonic() + within_s
    head = _read(link, _HEAD.size, end)
    if head is None:
        return None
    kind, size = _HEAD.unpack(head)
    message = _read(link, size, end)
    return None if message is None else (kind, message)


def _read(link: socket.socket, size: int, end: float | None) -> bytearray | None:
    data = bytearray(size)
    with memoryview(data) as view:
        at = 0
        while at < size:
            link.settimeout(None if end is None else max(1e-3, end - time.monotonic()))
            got = link.recv_into(view[at:])
            if not got:
                return None
            at += got
    return data
