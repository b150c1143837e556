"""The load generator, a process of its own: `python -m torchserve_dag.bench.load`, a Spec as JSON on its standard
input, Counts as JSON on its standard output.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.bench.answers import Answers
from torchserve_dag.bench.loops import ClosedLoop, Loop, OpenLoop
from torchserve_dag.bench.rest import RestSender
from torchserve_dag.bench.sender import Sender
from torchserve_dag.bench.window import Counts, Window
from torchserve_dag.server import json_module

_CONNECTIONS = 8
"""gRPC connections; each carries many requests at a time, like a channel that many clients share."""


@dataclass(frozen=True, slots=True)
class Rest:
    address: str
    """Where predictions are sent: http://HOST:PORT/PATH."""
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Grpc:
    target: str
    """HOST:PORT"""
    model: str
    version: str = ""
    token: str | None = None


@dataclass(frozen=True, slots=True)
class Spec:
    """One load: `clients` of a closed loop, or a `rate` of arrivals a second."""

    server: Rest | Grpc
    bodies: list[str]
    """Files, sent in turn."""
    seconds: float
    """The length of the window."""
    warm_up: float
    """The least time before the window, in seconds; it begins when every client of a closed loop has an answer."""
    clients: int | None = None
    rate: float | None = None
    seed: int = 0
    limit: float = 30.0
    """The time limit of a request, in seconds; a longer one is an error."""
    answer_ends: bool = False
    """Whether the answer is only the end of the content: a protocol's framing precedes it."""

    def __post_init__(self) -> None:
        if (self.clients is None) == (self.rate is None):
            raise ValueError("a load has either clients or a rate")
        if not self.bodies:
            raise ValueError("a load has at least one body")


async def run(spec: Spec, bodies: list[bytes]) -> Counts:
    """Send the load, and wait for the requests that are outstanding at the end."""
    window = Window(Answers(len(bodies), at_end=spec.answer_ends))
    sender = _sender(spec, bodies)
    loop: Loop
    if spec.clients is not None:
        loop = ClosedLoop(sender, window, len(bodies), spec.clients)
    else:
        loop = OpenLoop(sender, window, len(bodies), spec.rate or 1.0, spec.seed)
    loop.start()
    await asyncio.sleep(spec.warm_up)
    await _set(loop.steady, spec.limit)
    window.begin()
    await asyncio.sleep(spec.seconds)
    window.end()
    loop.stop()
    await _set(loop.quiet, spec.limit)  # the next load must not find requests of this one
    await sender.close()
    return window.counts()


async def _set(event: asyncio.Event, limit: float) -> None:
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(event.wait(), limit)


def _sender(spec: Spec, bodies: list[bytes]) -> Sender:
    if isinstance(spec.server, Rest):
        return RestSender(spec.server.address, spec.server.headers, bodies, spec.limit)
    from torchserve_dag.bench.grpc import GrpcSender  # noqa: PLC0415 (takes a while to import, and REST needs none)

    where = spec.server
    connections = min(spec.clients or _CONNECTIONS, _CONNECTIONS)
    return GrpcSender(where.target, where.model, where.version, where.token, bodies, spec.limit, connections)


def generate(spec: Spec) -> Counts:
    """Send the load that the spec describes, and return what was counted."""
    return asyncio.run(run(spec, [Path(path).read_bytes() for path in spec.bodies]))


if __name__ == "__main__":
    json_module.serve(Spec, generate)
