"""Bodies that a client compressed (`Content-Encoding`), with a bound on what they become."""

from __future__ import annotations

import zlib
from http import HTTPStatus

from torchserve_dag.runtime.messages import InputError

MAX_BYTES = 64 * 2**20
"""A compressed body that is larger once it is decompressed is refused, before all of it is decompressed."""

_GZIP, _ZLIB, _RAW = 31, 15, -15
"""zlib's `wbits` of the three formats."""


def decompressed(body: bytes, encoding: str | None) -> bytes:
    """A body without its content encoding: gzip or deflate.

    Raises InputError: 415 for another encoding, 413 for a body that becomes too large, 400 for one that is damaged.
    """
    names = [name for part in (encoding or "").lower().split(",") if (name := part.strip()) not in {"", "identity"}]
    if not names or not body:
        return body
    if names in (["gzip"], ["x-gzip"]):
        wbits = _GZIP
    elif names == ["deflate"]:  # zlib's format by the standard, and without its header from some clients
        wbits = _ZLIB if body[0] & 15 == zlib.DEFLATED and int.from_bytes(body[:2], "big") % 31 == 0 else _RAW
    else:
        what = f"The content encoding {', '.join(names)[:60]} is not accepted here"
        raise InputError(f"{what}: send gzip, deflate, or the body as it is.", HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
    unpacker = zlib.decompressobj(wbits)
    try:
        content = unpacker.decompress(body, MAX_BYTES + 1)
    except zlib.error:
        raise InputError(f"The body is not {names[0]}, as its content encoding says.") from None
    if len(content) > MAX_BYTES:
        what = f"The body is larger than {MAX_BYTES:,} bytes once it is decompressed."
        raise InputError(what, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    # One member only: decoding many small ones would copy the rest of the body once for each.
    if not unpacker.eof or unpacker.unused_data:
        raise InputError(f"The body is not one whole {names[0]} stream: it is cut, or more follows.")
    return content
