"""The line between a host and an archive: what a server may ask of the model that it serves.

A **host** receives requests and sends responses. The handlers, the engine and the codec belong to the **archive**,
which runs with the copy of this package that it was built with. TorchServe's workers run the loop in `torchserve/`
beside this file, which the archive carries too, so that the two always fit. Any other host has the loop of the
installed package, whose version may be another. So a host uses what this file names and nothing else of an archive: it
imports `load` from the archive's own `torchserve_dag.runtime.worker.service`, and calls the methods of `Service`; the
messages of `runtime/protos` are TorchServe's, and do not change any more. The
values are strings, bytes, numbers, mappings of these, and the three dataclasses below.

An archive's `build.json` says which `protocol` it speaks; `archives/protocol.py` reads it. Whoever changes the
meaning of anything here raises PROTOCOL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

PROTOCOL = 4

Metrics = Mapping[tuple[str, str, tuple[tuple[str, str], ...]], float]
"""Numbers by node, name on a page of metrics, and labels beside the node's; a histogram's bucket has `le` last."""

OnChunk = Callable[[bytes, str, Callable[[], None]], None]
"""Receives each chunk of an answer, its content type, and what the host calls once the client has taken the chunk.

The host calls that from any thread, also before it returns. It does not wait for the client here, which would hold up a
thread of the model's: a node that yields waits by itself for a client that leaves 16 chunks, or 1 MiB of them.
"""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a form, or an entry of gRPC's map."""

    name: str
    content: bytes
    content_type: str | None = None
    """Over gRPC, and for a form's field that is no file, None."""


@dataclass(frozen=True, slots=True)
class ServiceRequest:
    """A client's request, whatever server received it."""

    id: str
    """The request's id in logs, failures and feedback."""
    body: bytes = b""
    """The body as it was sent; empty where `parts` has the request's content."""
    content_type: str | None = None
    """As the client sent it. None: the service detects it from the bytes."""
    content_encoding: str | None = None
    """As the client sent it: the service decompresses the body."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Parameters beside the body: a URL's query."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Headers by their names in lower case: the time limit, the cancel key and the other options (see options.py)."""
    parts: Sequence[Part] | None = None
    """The parts of a form in their order, options excepted; None: the body is the only part."""
    repeated: Sequence[str] = ()
    """Names that several parts of the form had. `parts` has the last part of each name."""
    headers: Mapping[str, Any] = field(default_factory=dict)
    """The headers as they were sent, for TorchServe handlers."""


@dataclass(frozen=True, slots=True)
class ServiceResponse:
    """A whole answer, or a failure in JSON; after chunks, the rest of the answer, which is often empty."""

    body: bytes
    content_type: str = "application/json"
    """Empty: the response says none, as an unedited handler's may."""
    status: int = 200
    """The HTTP status. After chunks it says how the answer ended; the client has got 200 already. The body of a failure
    is then a line of JSON after the chunks."""
    headers: Mapping[str, str] = field(default_factory=dict)


class PendingResponse(Protocol):
    """A response that is being computed. It is always done by the request's time limit."""

    def result(self, timeout_s: float) -> ServiceResponse:
        """Waits for the response. Raises TimeoutError."""

    def add_done_callback(self, callback: Callable[[ServiceResponse], None]) -> None:
        """Call `callback` with the response, on the thread that finishes it. It must not wait for other requests."""

    def cancel(self) -> None:
        """Stop computing, because the client has disconnected. The response is then a failure with status 499."""


class Service(Protocol):
    """A loaded model. Every method may be called from every thread."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def timeout_s(self) -> float:
        """The longest time limit that a request may have, in seconds."""

    @property
    def streams(self) -> bool:
        """Whether answers come in chunks for a client that accepts them."""

    def describe(self) -> Mapping[str, Any]:
        """The content of the archive's `build.json`."""

    def submit(self, request: ServiceRequest, on_chunk: OnChunk | None = None) -> PendingResponse:
        """Start a request, and return at once. With `on_chunk`, an answer that streams leaves in chunks.

        `on_chunk` is called with one chunk after the other, none of them empty, and never after the response is done.
        Chunks that nothing can hold back, such as those of a TorchServe handler's process, come as they are: the
        request of a client that leaves more than 16 MiB of them ends with status 499.
        """

    def together(self) -> AbstractContextManager[None]:
        """A block at whose end the requests start that this thread submitted in it: cheaper than one by one."""

    def cancel(self, key: str) -> bool:
        """Cancel the request with this `x-cancel-key`. Returns whether there was one."""

    def metrics(self) -> Metrics:
        """Numbers that only grow, so that those of several processes add up."""

    def gauges(self) -> Metrics:
        """Numbers that rise and fall, of this process now."""

    def hangs(self) -> bool:
        """Whether a model hangs. Its thread can be ended only with the process."""

    def close(self) -> None:
        """Fail the requests in flight, and end the threads."""


class Load(Protocol):
    """`load` of `torchserve_dag.runtime.worker.service`."""

    def __call__(self, folder: Path, gpu: int | None) -> Service:
        """Load the model of an unpacked archive, on GPU number `gpu` if it uses one. Raises whatever loading raises."""
