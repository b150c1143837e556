"""The options of a request beside its message: headers over REST, entries of the input map over gRPC."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torchserve_dag.runtime.messages import InputError

Priority = Literal["interactive", "bulk"]

OUTPUTS, TIMEOUT, PRIORITY, TRACE = "x-outputs", "x-timeout-ms", "x-priority", "traceparent"
CANCEL_KEY, CANCEL = "x-cancel-key", "x-cancel"
REQUEST_ID, PIECES = "x-request-id", "x-pieces"
WITH_USAGE = "x-usage"

HEADERS = {
    OUTPUTS: "Nodes, separated by commas. Their results are the answer, and only the nodes that they need run.",
    TIMEOUT: "How long the client waits, in milliseconds, at least 1; then 408. `serve.timeout_s` of the workflow "
    "applies where it is shorter; then 504. The clients of this package send this option with every call.",
    PRIORITY: "`interactive` (the default) or `bulk`. Interactive requests overtake bulk requests, which still make "
    "progress.",
    TRACE: "The client's span, in W3C's format. The spans of the request become its children.",
    REQUEST_ID: "The request's id in logs, in failures and in feedback on its answer. Generated where the client sends "
    "none.",
    CANCEL_KEY: "A key that the client makes up, with which it can cancel this request. Behind the front door a key "
    "belongs to its token: another token's key may be the same, and cancels other requests.",
    CANCEL: "Cancels the requests that were sent with this key, if they are in the worker that receives the "
    "cancellation. The body is `{}`.",
    PIECES: "Over gRPC: that the call is `StreamPredictions`, so that the answer may come in chunks. TorchServe does "
    "not tell a worker which of its calls was used, and a second chunk would end `Predictions`.",
    WITH_USAGE: "Whatever its value: the answer says how many tokens all models of the workflow have counted. A whole "
    'answer has them in its header `x-usage`; an answer in chunks comes in lines of JSON, texts too (`{"text": "…"}`), '
    'of which the last is `{"usage": {…}}`.',
}
"""All options, with their meaning."""

TOKEN = "x-door-token"  # noqa: S105 (a header's name)
"""The name of the client's token, which the front door writes into each request. No client can set it there."""

ARRIVED = "x-arrived-ms"
"""When the request arrived at the front door, which writes it into each request: milliseconds since 1970."""

CONTENT_TYPE = "content-type"
"""The entry of a gRPC message's map that names its body's content type, as the header does over REST."""
NAMES = frozenset({*HEADERS, TOKEN, ARRIVED})
"""Entries of a gRPC message's map, and parts of a form, that are no part of the client's message."""

MAX_REQUEST_ID = 128
SHORTEST_S = 0.001
"""The shortest time limit that a client may choose."""
MAX_OUTPUTS = 4_000
"""The most characters of the header that names outputs, which over gRPC could be as long as a body."""


@dataclass(frozen=True, slots=True)
class Options:
    outputs: tuple[str, ...] = ()
    """Nodes whose results are the answer, instead of the workflow's own output."""
    timeout_s: float | None = None
    """How long the client waits, in seconds; the workflow's own limit applies where it is shorter."""
    priority: Priority = "interactive"
    """`interactive` requests overtake `bulk` requests."""
    trace: str | None = None
    """The client's span, as W3C's `traceparent`."""
    cancel_key: str | None = None
    """The key with which the client may cancel the request."""
    request_id: str | None = None
    """The request's id in logs and failures, and in feedback on its answer; generated where the client sends none."""

    token: str | None = None
    """The name of the client's token, if it came through the front door."""
    waited_s: float = 0.0
    """How long the request has been on its way from the front door: its time limit began there."""

    route_by: Mapping[str, str] = field(default_factory=dict)
    """Headers that the front door's `routes.yaml` asks for; over gRPC they are metadata."""

    def headers(self) -> dict[str, str]:
        """The headers that a client sends."""
        fields = {
            OUTPUTS: ",".join(self.outputs),
            TIMEOUT: str(math.ceil(self.timeout_s * 1000)) if self.timeout_s else "",
            PRIORITY: self.priority if self.priority != "interactive" else "",
            TRACE: self.trace or "",
            CANCEL_KEY: self.cancel_key or "",
            REQUEST_ID: self.request_id or "",
        }
        return {name: value for name, value in fields.items() if value}

    def metadata(self) -> dict[str, str]:
        """The gRPC metadata that the front door reads, beside the message."""
        own = {REQUEST_ID: self.request_id, CANCEL_KEY: self.cancel_key}
        return {**self.route_by, **{name: value for name, value in own.items() if value}}


NOTHING_ASKED = Options()


def read_options(headers: Mapping[str, str]) -> Options:
    """The options in a request's headers, whose names are in lower case. Raises InputError."""
    if headers.keys().isdisjoint(NAMES):
        return NOTHING_ASKED
    get = headers.get
    names = get(OUTPUTS) or ""
    if len(names) > MAX_OUTPUTS:
        raise InputError(f"The header {OUTPUTS} has {len(names):,} characters; the limit is {MAX_OUTPUTS:,}.")
    outputs = tuple(sorted({name.strip() for name in names.split(",") if name.strip()}))
    timeout = get(TIMEOUT)
    priority = (get(PRIORITY) or "interactive").strip().lower()
    if priority not in {"interactive", "bulk"}:
        raise InputError(f'The header {PRIORITY} is interactive or bulk, not "{priority[:50]}".')
    return Options(
        outputs,
        None if timeout is None else _seconds(timeout),
        priority,  # type: ignore[arg-type]
        get(TRACE),
        get(CANCEL_KEY),
        get(REQUEST_ID),
        get(TOKEN),
        _waited_s(get(ARRIVED)),
    )


def owned_keys(headers: dict[str, str]) -> dict[str, str]:
    """The headers with the name of their token in each cancel key, so that no other token's key is the same."""
    token = headers.get(TOKEN)
    return (
        headers
        if token is None
        else headers | {name: f"{token} {headers[name]}" for name in (CANCEL_KEY, CANCEL) if name in headers}
    )


def named(headers: Mapping[str, str]) -> str | None:
    """The id that a client gave its request; None if it is unfit for a line of a log."""
    name = headers.get(REQUEST_ID)
    return name if name and len(name) <= MAX_REQUEST_ID and name.isascii() and name.isprintable() else None


def _waited_s(arrived: str | None) -> float:
    """The seconds since a request arrived at the front door, which is on this machine; 0 where that is not known."""
    try:
        return max(0.0, time.time() - float(arrived) / 1000) if arrived else 0.0
    except ValueError:  # only the front door's own is always a number
        return 0.0


def _seconds(text: str) -> float:
    try:
        seconds = float(text) / 1000
    except ValueError:
        seconds = math.nan
    if not SHORTEST_S <= seconds < math.inf:
        raise InputError(f'The header {TIMEOUT} is a number of milliseconds, at least 1, not "{text[:50]}".')
    return seconds
