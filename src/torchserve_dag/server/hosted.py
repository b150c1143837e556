"""What the direct host is to serve: versions, how many workers each has, the default version of each model.

It is a file in the state folder. The keeper brings about what it says (`stack/workers.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from torchserve_dag.archives import atomic, mar
from torchserve_dag.archives.archive import Archive, ModelVersion
from torchserve_dag.runtime.data import plain, source
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State, locked

LOCK_S = 30.0
MAX_WORKERS = 1000


@dataclass(frozen=True, slots=True)
class HostedVersion:
    """A version that the direct host serves, as its archive's `model-config.yaml` says."""

    model: str
    version: str
    archive: str
    """The file name of the server's copy."""
    workers: int
    batch_size: int = 1
    max_batch_delay_ms: int = 100
    timeout_s: int = 120
    startup_s: int = 120
    queue: int = 100
    asynchronous: bool = False
    """`asyncCommunication`: TorchServe would let every request into the worker at once."""
    on_gpu: bool = True
    """Whether its workers may use GPUs."""
    decodes: bool = True
    """Whether an unedited archive's handler gets JSON and texts decoded: `decode_input_request`."""

    @property
    def key(self) -> ModelVersion:
        return self.model, self.version

    @property
    def most(self) -> int | None:
        """How many requests may be inside a worker: as many as TorchServe lets in and queue. In asynchronous mode
        TorchServe lets all in, and the archive itself knows how many it takes.
        """
        return None if self.asynchronous else self.batch_size + self.queue


@dataclass(frozen=True, slots=True)
class Hosted:
    """All that the direct host is to serve."""

    versions: tuple[HostedVersion, ...] = ()
    defaults: dict[str, str] = field(default_factory=dict)
    """Model → the version that answers requests without one."""
    max_body: int = 0
    """The largest body of a request, in bytes."""
    gpus: int | None = None
    """How many GPUs may be used; None for all."""

    def of(self, key: ModelVersion) -> HostedVersion | None:
        return next((one for one in self.versions if one.key == key), None)


class HostedFile:
    """The file, read and changed by one process or thread at a time."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._path = state.direct / "hosted.json"
        self._last: tuple[tuple[int, int], Hosted] | None = None
        """What was read last, with the time and the inode of the file: it is always replaced as a whole."""

    def read(self) -> Hosted:
        """Raises ServerError if it cannot be read."""
        try:
            stamp = (stat := self._path.stat()).st_mtime_ns, stat.st_ino
            if self._last is None or self._last[0] != stamp:
                self._last = stamp, plain.build(Hosted, json.loads(self._path.read_text("utf-8")))
            return self._last[1]
        except FileNotFoundError:
            return Hosted()
        except (OSError, ValueError, plain.WrongDataError) as error:
            raise ServerError(
                f"{self._path} cannot be read ({error}): stop the server with torchserve-dag down."
            ) from None

    def change(self, change: Callable[[Hosted], Hosted]) -> Hosted:
        """Raises ServerError."""
        self._state.direct.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(
            self._state.direct / "hosted.lock", LOCK_S, "Another command is changing what is served: try again."
        ):
            before = self.read()
            after = change(before)
            if after != before:
                atomic.write_reserved(self._path, json.dumps(plain.flatten(after)))
        return after


def hosted_version(archive: Archive, properties: Mapping[str, str]) -> HostedVersion:
    """What an archive says about how it is served; where it says nothing, `config.properties`."""
    settings = _settings(archive)

    def number(key: str, default: int, of_all: str = "") -> int:
        value = settings.get(key, properties.get(of_all, default))
        return int(value) if isinstance(value, int) or str(value).isdigit() else default

    workers = number("minWorkers", 1, "default_workers_per_model")
    return HostedVersion(
        archive.name,
        archive.version,
        archive.path.name,
        max(1, min(MAX_WORKERS, workers)),
        number("batchSize", 1),
        number("maxBatchDelay", 100),
        number("responseTimeout", 120, "default_response_timeout"),
        number("startupTimeout", 120, "default_startup_timeout"),
        number("jobQueueSize", 100, "job_queue_size"),
        settings.get("asyncCommunication") is True,
        settings.get("deviceType") != "cpu",
        properties.get("decode_input_request", "true").lower() == "true",
    )


def _settings(archive: Archive) -> dict[str, Any]:
    try:
        named = mar.read_json(archive.path, mar.MANIFEST)["model"].get("configFile")
        found = source.load(mar.read_text(archive.path, str(named))) if named else {}
    except (OSError, KeyError, ValueError, RecursionError, mar.BadArchiveError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
