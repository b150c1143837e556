"""Serves a project's folder over HTTP on this machine, looks for saved files, and says what it sees."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.archives.archive import ModelVersion
from torchserve_dag.clients.models import version_key
from torchserve_dag.dev.loader import DevLoader, FolderState, Stamp, stamps
from torchserve_dag.direct import http
from torchserve_dag.direct.app import DirectApp
from torchserve_dag.direct.entrance import Entrance

logger = logging.getLogger(__name__)

LOOK_S = 0.25
"""How often the folder is looked at."""
SWAP_S = 10.0
"""How long the event loop may take to route requests to what was loaded, which computes nothing."""
LEAVE_S = 60.0
"""How long requests may take in a version that a newer state of the folder has replaced."""


@dataclass(frozen=True, slots=True)
class Changed:
    """The folder was loaded, at first or again."""

    files: Sequence[Path]
    """The files that were saved, made or deleted; none at first."""
    state: FolderState
    seconds: float


Show = Callable[[Changed], None]


class DevServer:
    """Serves one project's folder until SIGINT or SIGTERM."""

    def __init__(self, loader: DevLoader, max_body: int, show: Show) -> None:
        """`show` is called after each load, on a thread of its own."""
        self._loader, self._max_body, self._show = loader, max_body, show
        self._entrances: dict[ModelVersion, Entrance] = {}
        self._newest: dict[str, Entrance] = {}
        self._ended = threading.Event()

    def run(self, listening: socket.socket) -> None:
        http.run(self._run(listening))

    async def _run(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        watcher = threading.Thread(target=self._watch, args=(loop,), name="folder watcher", daemon=True)
        try:
            await http.serve(
                DirectApp(self._find, self._max_body, self._why_not_ready), listening, lambda _: watcher.start()
            )
        finally:
            self._ended.set()

    def _find(self, name: str, version: str | None) -> Entrance | None:
        return self._newest.get(name) if version is None else self._entrances.get((name, version))

    def _why_not_ready(self) -> str:
        return "" if self._entrances else "nothing is loaded"

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Load the folder at first, after changes that two looks see alike, and when a model hangs."""
        root = self._loader.project.root
        before: dict[Path, Stamp] | None = None
        now = stamps(root)
        while not self._ended.is_set():
            if now != before or self._loader.hangs():
                try:
                    self._reload(loop, _difference(before, now))
                except (Exception, SystemExit):  # the latter is rich's, where the terminal is closed
                    logger.exception("the folder could not be loaded again")
                before = now
            settled = False
            while not settled and not self._ended.wait(LOOK_S):  # a program may still be writing
                latest = stamps(root)
                settled, now = latest == now, latest

    def _reload(self, loop: asyncio.AbstractEventLoop, files: Sequence[Path]) -> None:
        began = time.monotonic()
        loaded = self._loader.load()
        asyncio.run_coroutine_threadsafe(self._serve(loaded), loop).result(SWAP_S)
        self._show(Changed(files, loaded, time.monotonic() - began))

    async def _serve(self, loaded: FolderState) -> None:
        """Requests that enter from now on get the new services; those inside the old ones are answered there."""
        before = self._entrances
        self._entrances = {
            key: before[key] if key in before and key not in loaded.new else Entrance(service)
            for key, service in loaded.services.items()
        }
        ordered = sorted(self._entrances, key=lambda key: version_key(key[1]))
        self._newest = {name: self._entrances[name, version] for name, version in ordered}
        for key, entrance in before.items():
            if self._entrances.get(key) is not entrance:
                task = asyncio.create_task(_leave(entrance))
                _leaving.add(task)
                task.add_done_callback(_leaving.discard)


def _difference(before: Mapping[Path, Stamp] | None, now: Mapping[Path, Stamp]) -> list[Path]:
    """The files that were saved, made or deleted."""
    return [] if before is None else sorted(path for path in {*before, *now} if before.get(path) != now.get(path))


_leaving: set[asyncio.Task[None]] = set()
"""Held here, because the event loop holds tasks only weakly."""


async def _leave(entrance: Entrance) -> None:
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(entrance.empty.wait(), LEAVE_S)
    await asyncio.to_thread(entrance.service.close)
