"""One version of a model behind HTTP, in a process of its own: what a worker's program runs (worker.py).

It is imported once the archive's own `runtime/` is in its place.
"""

from __future__ import annotations

import gc
import json
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, cast

from torchserve_dag.direct import http
from torchserve_dag.direct.app import DirectApp
from torchserve_dag.direct.entrance import Entrance
from torchserve_dag.direct.main_thread import RunsOnMainThread
from torchserve_dag.runtime.worker.protocol import Service, ServiceResponse

logger = logging.getLogger(__name__)

FORMAT = "%(asctime)s [%(levelname)s] %(name)s - %(message)s"


def serve(folder: Path, path: Path, gpu: int | None, max_body: int, most: int | None) -> None:
    """Load an unpacked archive, and serve it on a Unix socket at `path` until SIGINT. Raises whatever loading raises.

    The socket is there once the model is loaded and warm. `max_body` is in bytes. `most` requests may be inside; one
    more is refused. (An unedited archive has a queue of its own.)
    """
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=FORMAT)
    began = time.monotonic()
    service = _load(folder, gpu)
    logger.info("%s %s is loaded after %.1f s", service.name, service.version, time.monotonic() - began)
    gc.collect()
    gc.freeze()  # what is loaded stays: the garbage collector would look at all of torch's objects again and again
    listening = http.listen_at(path)
    try:
        if isinstance(service, RunsOnMainThread):
            _serve_beside(service, listening, max_body)
        else:
            http.run(_serve(service, listening, max_body, drains_on=[signal.SIGINT], most=most))
    finally:
        path.unlink(missing_ok=True)
        service.close()
    logger.info("%s %s has ended", service.name, service.version)


def _load(folder: Path, gpu: int | None) -> Service:
    if (folder / "build.json").exists():
        from torchserve_dag.runtime.worker.service import load  # noqa: PLC0415 (the archive's own)

        return load(folder, gpu)
    from torchserve_dag.direct import torchserve_archive  # noqa: PLC0415 (it has no runtime of its own)

    return torchserve_archive.load(folder, gpu)


def _serve_beside(service: Service, listening: socket.socket, max_body: int) -> None:
    """Serve on another thread, for the model has this one."""
    drains: list[Callable[[], None]] = []
    signal.signal(signal.SIGINT, lambda *_: [drain() for drain in drains])

    def run() -> None:
        try:
            http.run(_serve(service, listening, max_body, drains.append))
        finally:
            service.close()

    network = threading.Thread(target=run, name="http")
    network.start()
    try:
        cast("RunsOnMainThread", service).run()
    finally:  # also where a handler ends the process: those who wait get their answers
        for drain in drains:
            drain()
        network.join(http.DRAIN_S)


def metrics_of(service: Service) -> dict[str, list[list[Any]]]:
    """What a worker says to the keeper, who makes a page of it (stack/metrics_page.py)."""
    return {
        kind: [[*series, value] for series, value in read().items()]
        for kind, read in (("metrics", service.metrics), ("gauges", service.gauges))
    }


async def _serve(
    service: Service,
    listening: socket.socket,
    max_body: int,
    ready: Callable[[Callable[[], None]], None] = lambda _: None,
    drains_on: Collection[signal.Signals] = (),
    most: int | None = None,
) -> None:
    takes = service.describe().get("max_inside")  # an unedited archive says nothing
    entrance = Entrance(service, min((number for number in (most, takes) if number is not None), default=None))

    def find(name: str, version: str | None) -> Entrance | None:
        return entrance if name == service.name and version in {None, "", service.version} else None

    def state(what: str) -> ServiceResponse | None:
        """What the keeper asks a worker."""
        found: Any
        if what == "state":
            found = {"inside": entrance.inside, "hangs": service.hangs()}
        elif what == "metrics":
            found = metrics_of(service)
        else:
            return None
        return ServiceResponse(json.dumps(found).encode())

    app = DirectApp(find, max_body, about=state)
    await http.serve(app, listening, ready, drains_on=drains_on, idle_s=http.BEHIND_ENVOY_S)
