"""What an unedited handler gets for an item: TorchServe's row, as TorchServe sends it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchserve_dag.runtime.compat.wire import WireRequest
from torchserve_dag.runtime.data import codec, plain
from torchserve_dag.runtime.data.parts import BODY, fields_apart
from torchserve_dag.runtime.messages import Photo, Text

JSON, PLAIN_TEXT = "application/json", "text/plain"
"""The content types whose bodies TorchServe decodes for a handler."""

_NOT_OF_WORKFLOWS = {"explain", "describe"}
"""Headers that TorchServe adds to requests for a model, and not to those for a workflow."""


@dataclass(frozen=True, slots=True)
class Row:
    """A request as TorchServe hands it to a handler: its body as `body`, or the parts of a form by their names."""

    values: Mapping[str, Any]
    """The bytes that a client or a node sent, or messages, which are encoded for the handler."""
    headers: Mapping[str, Any] = field(default_factory=dict)
    """The request's headers, and for each part that the client sent a mapping with its `content-type`."""

    @classmethod
    def received(cls, values: Mapping[str, Any], headers: Mapping[str, Any]) -> Row:
        """The row that TorchServe sent to a worker."""
        return cls(values, {key: value for key, value in headers.items() if key not in _NOT_OF_WORKFLOWS})


def wire_request(name: str, item: Any) -> WireRequest:
    """An item, which is a Row or a message, as TorchServe would send it. Raises whatever encoding raises."""
    row = item if isinstance(item, Row) else Row(fields_apart(item) or {BODY: item})
    parts: dict[str, bytes] = {}
    headers: dict[str, Any] = {key: value for key, value in row.headers.items() if isinstance(value, str)}
    for key, value in row.values.items():
        if isinstance(value, bytes | bytearray | memoryview):
            about = row.headers.get(key)
            media = about.get("content-type", "") if isinstance(about, Mapping) else ""
            parts[key] = bytes(value)
        else:
            media, parts[key] = _encoded(value)
        headers[key] = {"content-type": media}
    return WireRequest(name, parts, headers)


def _encoded(value: Any) -> tuple[str, bytes]:
    """A message's content type and body. Without a type a handler gets the bytes, as it does a file's."""
    if isinstance(value, Text):
        return "", value.text.encode()
    if isinstance(value, Photo):
        return "", value.file or codec.bmp(value)
    if isinstance(value, str):
        return PLAIN_TEXT, value.encode()
    return JSON, json.dumps(plain.flatten(value), ensure_ascii=False).encode()
