"""What a client sent: its body, its parameters, and what it asks of its request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchserve_dag.runtime.data.options import CANCEL, PIECES, Options, named, read_options, without_options

BODY_KEYS = ("body", "data")
"""Where a request's body is: TorchServe calls a raw body `body`; its clients call a form's part `data`."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """One request, over REST or gRPC."""

    id: str | None
    body: bytes
    content_type: str | None
    parameters: dict[str, str]
    asked: Mapping[str, str]
    """Headers by their names in lower case, and the parameters, which say the same over gRPC."""
    rest: bool
    """Whether it came over REST."""
    parts: Mapping[str, Any]
    """What it came as: all parts of a form by their names, or one; without options."""
    headers: Mapping[str, Any]
    """As TorchServe has them: with the content type of each part among them."""
    describes: bool
    """Whether it asks for nothing but a description."""

    @property
    def cancels(self) -> str | None:
        """The key of the request that it calls off; then it is no prediction."""
        return self.asked.get(CANCEL)

    @property
    def takes_pieces(self) -> bool:
        """Whether its client takes an answer in pieces."""
        return self.rest or PIECES in self.asked

    def options(self) -> Options:
        """Raises InputError."""
        return read_options(self.asked)


def read_incoming(request_id: str | None, row: Mapping[str, Any], headers: Mapping[str, Any]) -> Incoming:
    """A request from its row, and its headers with the content types of its parts among them.

    `request_id` is what TorchServe calls it; what the client calls it is better, for the client knows it too.
    """
    key = next((k for k in BODY_KEYS if k in row), None)
    if key is None:
        names = without_options(dict.fromkeys(row, ""))
        if len(names) == 1:  # a gRPC client may call its one input as it likes
            (key,) = names
    body = row.get(key, b"") if key else b""
    part = headers.get(key) if key else None  # a part's own type comes under its name, the request's under its header
    parameters = {k: _text(v) for k, v in row.items() if k != key}
    said = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
    asked = {name.lower(): value for name, value in parameters.items()} | said if parameters else said
    return Incoming(
        named(asked) or request_id,
        bytes(body) if isinstance(body, bytes | bytearray) else json.dumps(body).encode(),
        part.get("content-type") if isinstance(part, dict) else None,
        without_options(parameters) if parameters else parameters,
        asked,
        over_rest(said),
        without_options(row),
        headers,
        headers.get("describe") == "True",
    )


def over_rest(headers: Mapping[str, Any]) -> bool:
    """Whether TorchServe answers over HTTP; a description it makes of one whole answer, as over gRPC.

    It adds `explain` to most of REST's predictions, and no header at all to gRPC's. HTTP/1.1 has a `Host`.
    """
    if isinstance(headers.get("explain"), str):
        return True
    names = {name.lower() for name, value in headers.items() if isinstance(value, str)}
    return "explain" in names or ("host" in names and "describe" not in names)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes | bytearray) else str(value)
