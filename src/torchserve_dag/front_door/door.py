"""The front door of one project: what it is told, by files that Envoy reads, and whether it has taken it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchserve_dag.archives import atomic
from torchserve_dag.clients import KeyFile
from torchserve_dag.front_door import resources
from torchserve_dag.front_door.admin import Admin
from torchserve_dag.front_door.bootstrap import CERTIFICATE, CLUSTERS, ROUTES
from torchserve_dag.front_door.resources import TYPES, Resource
from torchserve_dag.front_door.routes_file import RouteFile
from torchserve_dag.front_door.settings import FrontDoor
from torchserve_dag.front_door.splits import RolloutShare, ServedVersion, Split, splits
from torchserve_dag.front_door.tokens import TokenStore
from torchserve_dag.runtime.data import plain
from torchserve_dag.server import processes
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.state import State, locked

TAKEN_S = 10.0
"""How long Envoy may take to read a file that has changed; it takes milliseconds."""
LOCK_S = 30.0


@dataclass(frozen=True, slots=True)
class FrontDoorProcess:
    """A front door that was started."""

    pid: int
    """Of the process that keeps Envoy."""
    settings: FrontDoor
    certificate: str
    """The file of PEM that it shows."""
    key: str
    """That of its private key."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """All that decides where a request goes."""

    torchserve: Addresses = field(default_factory=Addresses)
    served: tuple[ServedVersion, ...] = ()
    leaving: tuple[ServedVersion, ...] = ()
    """Get no more requests, and answer those that are inside."""
    defaults: dict[str, str] = field(default_factory=dict)
    """Which version answers for a model that `routes.yaml` does not know."""
    routes: dict[str, RouteFile] = field(default_factory=dict)
    """`routes.yaml`, as it was when it was last taken."""
    rollouts: dict[str, RolloutShare] = field(default_factory=dict)
    """What models are on their way to."""
    ejected: tuple[tuple[str, str], ...] = ()
    """Models and versions that keep failing, and are left alone for a while."""

    @property
    def splits(self) -> list[Split]:
        return splits(self.served, self.routes, self.defaults, self.rollouts, self.ejected)

    def split(self, model: str) -> Split | None:
        return next((one for one in self.splits if one.model == model), None)


class Door:
    """What is kept of the front door in the project's state folder, and what Envoy is told."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.folder = state.front_door
        self.admin = Admin(self.folder)
        self.tokens = TokenStore(self.folder)
        self._traffic = self.folder / "traffic.json"
        self._record = self.folder / "door.json"

    def record(self) -> FrontDoorProcess | None:
        """The front door that runs; nothing where none does."""
        try:
            found = plain.build(FrontDoorProcess, json.loads(self._record.read_text("utf-8")))
        except (OSError, ValueError, plain.WrongDataError):
            return None
        return found if processes.ours(found.pid, self.state) else None

    def save(self, record: FrontDoorProcess) -> None:
        atomic.write_private(self._record, json.dumps(plain.flatten(record)))

    def traffic(self) -> Traffic:
        """What was decided last."""
        try:
            return plain.build(Traffic, json.loads(self._traffic.read_text("utf-8")))
        except (OSError, ValueError, plain.WrongDataError):
            raise ServerError("The front door knows of no model: start it with torchserve-dag up.") from None

    def change(self, change: Callable[[Traffic], Traffic]) -> Traffic:
        """Decide anew, and return when Envoy goes by it; no connection is dropped. Raises ServerError."""
        with self._lock():
            before = self.traffic()
            after = change(before)
            atomic.write_private(self._traffic, json.dumps(plain.flatten(after)))
            try:
                self._tell(after)
            except ServerError:
                atomic.write_private(self._traffic, json.dumps(plain.flatten(before)))
                for name, kind, found in self._files(before):  # for an Envoy that takes them later
                    self._write(name, kind, found)
                raise
        return after

    def begin(self, where: Addresses) -> None:
        """Forget what was decided, and write what Envoy reads when it starts."""
        atomic.write_private(self._traffic, json.dumps(plain.flatten(Traffic(where))))
        for name, kind, found in self._files(Traffic(where)):
            self._write(name, kind, found)

    def show_certificate(self, certificate: Path, key: Path) -> None:
        """As it is in these files now; new connections see it."""
        pems = {"certificate_chain": certificate, "private_key": key}
        shown = {name: {"inline_string": path.read_text("utf-8")} for name, path in pems.items()}
        kind = "extensions.transport_sockets.tls.v3.Secret"
        self._write(CERTIFICATE, kind, [{"@type": f"{TYPES}{kind}", "name": "certificate", "tls_certificate": shown}])

    def issue_token(self, name: str, lives_s: float, requests_per_second: int | None = None) -> str:
        """A new token, which is let in when this returns, where the front door runs. Raises ServerError."""
        with self._lock():
            text = self.tokens.issue(name, lives_s, requests_per_second)
            self._tell_tokens()
        return text

    def revoke_token(self, name: str) -> None:
        """When this returns, it is let in no more. Raises ServerError."""
        with self._lock():
            self.tokens.revoke(name)
            self._tell_tokens()

    def _tell_tokens(self) -> None:
        if self.admin.listens():  # Envoy, whatever became of its keeper
            self._tell(self.traffic())

    def _tell(self, traffic: Traffic) -> None:
        """Clusters before the routes that name them; and those that no route names any more, last."""
        (_, kind, now), (_, routes_kind, routes) = self._files(traffic)
        names = {cluster["name"] for cluster in now}
        before = json.loads((self.folder / CLUSTERS).read_text("utf-8"))["resources"]
        leaving = [cluster for cluster in before if cluster["name"] not in names]
        self._tell_one(CLUSTERS, kind, [*now, *leaving])
        self._tell_one(ROUTES, routes_kind, routes)
        if leaving:
            self._tell_one(CLUSTERS, kind, now)

    def _tell_one(self, name: str, kind: str, found: list[Resource]) -> None:
        version = self._write(name, kind, found)
        what = "cds" if name == CLUSTERS else "routes"
        deadline = time.monotonic() + TAKEN_S
        while self.admin.versions().get(what) != version:
            if time.monotonic() > deadline:
                raise ServerError(f"The front door does not take {name}: see front_door.log in {self.state.logs}.")
            time.sleep(0.01)

    def _files(self, traffic: Traffic) -> list[tuple[str, str, list[Resource]]]:
        token, rate = self._torchserve_token(), self._requests_per_second()
        shares = traffic.splits
        clusters = resources.clusters([*traffic.served, *traffic.leaving], shares, traffic.torchserve, token)
        routes = resources.routes(traffic.served, shares, self.tokens.issued(), token, rate)
        return [
            (CLUSTERS, "config.cluster.v3.Cluster", clusters),
            (ROUTES, "config.route.v3.RouteConfiguration", [routes]),
        ]

    def _write(self, name: str, kind: str, found: list[Resource]) -> str:
        version = str(time.time_ns())
        said: dict[str, Any] = {"version_info": version, "type_url": f"type.googleapis.com/envoy.{kind}"}
        atomic.write_private(self.folder / name, json.dumps({**said, "resources": found}))
        return version

    def _torchserve_token(self) -> str:
        try:
            return KeyFile.read(self.state.key_file).inference
        except (OSError, ValueError):  # it is starting
            return ""

    def _requests_per_second(self) -> int:
        record = self.record()
        return (record.settings if record else FrontDoor()).limits.requests_per_second

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self.folder / "lock", LOCK_S, "Another command is changing the front door: try again."):
            yield


def set_rollout(model: str, rolling: RolloutShare | None) -> Callable[[Traffic], Traffic]:
    """A change: how far a rollout of a model is; None ends it."""

    def change(traffic: Traffic) -> Traffic:
        others = {name: found for name, found in traffic.rollouts.items() if name != model}
        return replace(traffic, rollouts=others if rolling is None else {**others, model: rolling})

    return change
