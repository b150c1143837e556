"""The front door of one project: its traffic configuration, applied through files that Envoy watches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchserve_dag.archives import atomic
from torchserve_dag.clients import KeyFile
from torchserve_dag.front_door import clusters, envoy_config
from torchserve_dag.front_door.accepted_tokens import accepted_tokens
from torchserve_dag.front_door.access_logs import sampling
from torchserve_dag.front_door.admin import Admin
from torchserve_dag.front_door.backend import MODELS, Backend, Resource
from torchserve_dag.front_door.dynamic_files import ACCEPTED, CERTIFICATE, CLUSTERS, ROUTES, SAMPLING
from torchserve_dag.front_door.envoy_config import TOKENS_FILTER, TYPES
from torchserve_dag.front_door.routes_file import RouteFile
from torchserve_dag.front_door.settings import FrontDoor, Limits
from torchserve_dag.front_door.splits import RolloutShare, ServedVersion, Split, splits
from torchserve_dag.front_door.tokens import TokenStore
from torchserve_dag.runtime.data import plain
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.state import State, locked
from torchserve_dag.server.supervised import Supervised

Files = list[tuple[str, str, list[Resource]]]
"""Envoy's dynamic files: the name, the type of the resources, the resources."""

_SUBSCRIPTIONS = {CLUSTERS: "cds", ROUTES: "routes", ACCEPTED: TOKENS_FILTER}
"""Each file's name in Envoy's statistics."""

APPLIED_S = 10.0
"""How long Envoy may take to apply a changed file; it takes milliseconds."""
LOCK_S = 30.0


@dataclass(frozen=True, slots=True)
class FrontDoorRecord:
    """A front door that was started."""

    settings: FrontDoor
    certificate: str
    """The PEM file with the certificate that clients see."""
    key: str
    """The PEM file with its private key."""
    tls: bool = True
    """Whether it listens for clients, with TLS and tokens. If not, Envoy is only the direct host's network side."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Everything that decides which version gets a request."""

    torchserve: Addresses = field(default_factory=Addresses)
    served: tuple[ServedVersion, ...] = ()
    leaving: tuple[ServedVersion, ...] = ()
    """Versions that get no new requests, and still answer those in flight."""
    defaults: dict[str, str] = field(default_factory=dict)
    """Model → default version, for models that are not in `routes.yaml`."""
    routes: dict[str, RouteFile] = field(default_factory=dict)
    """`routes.yaml`, as it was when it was last applied."""
    rollouts: dict[str, RolloutShare] = field(default_factory=dict)
    """Model → new version and share of its running rollout."""
    ejected: tuple[tuple[str, str], ...] = ()
    """Models and versions that keep failing and get no requests for a while."""
    resting: tuple[tuple[str, str, int], ...] = ()
    """Model, version, number of workers, while these are started again: requests get 503, or the fallback's answer."""
    sockets: dict[str, tuple[str, ...]] | None = None
    """Of the direct host: for each version by its name, the sockets of its workers; None for TorchServe."""
    closed: bool = False
    """Whether the host is starting, at first or again: every request is answered 503, with `retry-after`."""

    @property
    def splits(self) -> list[Split]:
        out = (*self.ejected, *self.resting_versions, *self.without_workers)
        return splits(self.served, self.routes, self.defaults, self.rollouts, out)

    @property
    def without_workers(self) -> tuple[tuple[str, str], ...]:
        """Of the direct host: versions of which no worker is ready. Their fallbacks answer, if they have any."""
        if self.sockets is None:
            return ()
        return tuple((one.model, one.version) for one in self.served if not self.sockets.get(one.name))

    @property
    def resting_versions(self) -> tuple[tuple[str, str], ...]:
        return tuple((model, version) for model, version, _ in self.resting)

    def split(self, model: str) -> Split | None:
        return next((one for one in self.splits if one.model == model), None)


class Door:
    """The front door's files in the project's state folder: its record, its tokens, Envoy's dynamic configuration."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.folder = state.front_door
        self.admin = Admin(self.folder)
        self.tokens = TokenStore(self.folder)
        self._traffic = self.folder / "traffic.json"
        self._record = self.folder / "door.json"

    def record(self) -> FrontDoorRecord | None:
        """The front door that was started, and not stopped since: Envoy may be about to be started again."""
        try:
            return plain.build(FrontDoorRecord, json.loads(self._record.read_text("utf-8")))
        except (OSError, ValueError, plain.WrongDataError):
            return None

    def save(self, record: FrontDoorRecord) -> None:
        atomic.write_private(self._record, json.dumps(plain.flatten(record)))

    def forget(self) -> None:
        self._record.unlink(missing_ok=True)

    def traffic(self) -> Traffic:
        """The current traffic configuration. Raises ServerError if there is none."""
        try:
            return plain.build(Traffic, json.loads(self._traffic.read_text("utf-8")))
        except (OSError, ValueError, plain.WrongDataError):
            raise ServerError("The front door has no models: start it with torchserve-dag up.") from None

    def changed(self) -> tuple[int, int]:
        """What differs whenever the traffic configuration was changed. Raises OSError if there is none."""
        stat = self._traffic.stat()
        return stat.st_mtime_ns, stat.st_ino

    def change(self, change: Callable[[Traffic], Traffic]) -> Traffic:
        """Change the traffic configuration; returns when Envoy applies it. Drops no connection. Raises ServerError.

        An Envoy that has ended reads the change when it is started again.
        """
        with self._lock():
            before = self.traffic()
            after = change(before)
            files = self._files(after)
            json.dumps(
                [plain.flatten(after), files], allow_nan=False
            )  # whatever cannot be written, raises before it is
            self._save_traffic(after)
            try:
                self._apply(files)
            except BaseException:
                self._save_traffic(before)
                self._write_all(self._files(before))  # Envoy may be slow rather than unable, and read the files later
                raise
        return after

    def begin(self, where: Addresses, *, direct: bool = False) -> None:
        """Reset the traffic configuration, closed, and write the files that Envoy reads at start-up."""
        (self.folder / MODELS).parent.resolve().mkdir(mode=0o700, parents=True, exist_ok=True)
        traffic = Traffic(where, sockets={} if direct else None, closed=True)
        self._save_traffic(traffic)
        self._write_all(self._files(traffic))
        self._write_accepted()
        self._write(SAMPLING, "type.v3.TokenBucket", sampling())

    def _write_all(self, files: Files) -> None:
        for name, kind, found in files:
            self._write(name, kind, found)

    def show_certificate(self, certificate: Path, key: Path) -> None:
        """Use these files for new connections."""
        pems = {"certificate_chain": certificate, "private_key": key}
        shown = {name: {"inline_string": path.read_text("utf-8")} for name, path in pems.items()}
        kind = "extensions.transport_sockets.tls.v3.Secret"
        self._write(CERTIFICATE, kind, [{"@type": f"{TYPES}{kind}", "name": "certificate", "tls_certificate": shown}])

    def issue_token(
        self,
        name: str,
        lives_s: float,
        requests_per_second: int | None = None,
        tokens_per_minute: int | None = None,
        models: Collection[str] = (),
    ) -> str:
        """A new token; if the front door runs, it accepts the token when this returns. Raises ServerError.

        `models` are those that it may call, all if it is empty. `TokenStore.issue` has the other parameters.
        """
        text = self.tokens.issue(name, lives_s, requests_per_second, tokens_per_minute, models)
        try:
            if self.admin.listens():  # even if Envoy's keeper has ended
                self.change(lambda traffic: traffic)  # the rate limits of the tokens are among the routes
            self._accept()
        except BaseException:
            self.tokens.revoke(name)
            raise
        return text

    def revoke_token(self, name: str) -> None:
        """Revoke a token; the front door refuses it when this returns. Raises ServerError.

        It waits for no lock, and neither the routes nor space on the disk are needed for it.
        """
        self.tokens.revoke(name)
        self._accept()

    def _accept(self) -> None:
        """Have the front door accept exactly the tokens that are issued."""
        version = self._write_accepted()
        if self.admin.listens():
            self._wait_until_applied(ACCEPTED, version)

    def _write_accepted(self) -> str:
        while True:
            tokens = self.tokens.issued()
            version = self._write(ACCEPTED, "config.core.v3.TypedExtensionConfig", [accepted_tokens(tokens)])
            if tokens == self.tokens.issued():  # else a command beside this one may have written before this one did
                return version

    def _apply(self, files: Files) -> None:
        """Add clusters before the routes that name them, and remove clusters after the routes that named them."""
        if Supervised(self.state).process("Envoy") is None:
            self._write_all(files)
            return
        (_, kind, now), (_, routes_kind, routes) = files
        names = {cluster["name"] for cluster in now}
        before = json.loads((self.folder / CLUSTERS).read_text("utf-8"))["resources"]
        leaving = [cluster for cluster in before if cluster["name"] not in names]
        self._apply_file(CLUSTERS, kind, [*now, *leaving])
        self._apply_file(ROUTES, routes_kind, routes)
        if leaving:
            self._apply_file(CLUSTERS, kind, now)

    def _apply_file(self, name: str, kind: str, found: list[Resource]) -> None:
        self._wait_until_applied(name, self._write(name, kind, found))

    def _wait_until_applied(self, name: str, version: str) -> None:
        what, deadline = _SUBSCRIPTIONS[name], time.monotonic() + APPLIED_S
        while int(self.admin.versions().get(what) or 0) < int(version):  # a newer one has what this one has
            if time.monotonic() > deadline:
                raise ServerError(f"The front door does not apply {name}: see front_door.log in {self.state.logs}.")
            time.sleep(0.01)

    def _files(self, traffic: Traffic) -> Files:
        limits = self._limits()
        backend = Backend(traffic.torchserve, self._torchserve_token(), traffic.sockets)
        shares = traffic.splits
        found = clusters.clusters(
            [*traffic.served, *traffic.leaving], shares, backend, limits, traffic.resting_versions
        )
        routes = envoy_config.routes(
            traffic.served,
            shares,
            self.tokens.issued(),
            backend,
            limits.requests_per_second,
            closed=traffic.closed,
        )
        return [
            (CLUSTERS, "config.cluster.v3.Cluster", found),
            (ROUTES, "config.route.v3.RouteConfiguration", [routes]),
        ]

    def _write(self, name: str, kind: str, found: list[Resource]) -> str:
        version = str(time.time_ns())
        header: dict[str, Any] = {"version_info": version, "type_url": f"type.googleapis.com/envoy.{kind}"}
        atomic.write_reserved(self.folder / name, json.dumps({**header, "resources": found}, allow_nan=False))
        return version

    def _save_traffic(self, traffic: Traffic) -> None:
        atomic.write_reserved(self._traffic, json.dumps(plain.flatten(traffic), allow_nan=False))

    def _torchserve_token(self) -> str:
        try:
            return KeyFile.read(self.state.key_file).inference
        except (OSError, ValueError):  # it is starting
            return ""

    def _limits(self) -> Limits:
        record = self.record()
        return (record.settings if record else FrontDoor()).limits

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self.folder / "lock", LOCK_S, "Another command is changing the front door: try again."):
            yield


def set_rollout(model: str, rolling: RolloutShare | None) -> Callable[[Traffic], Traffic]:
    """A change that sets the share of a model's rollout; None removes it."""

    def change(traffic: Traffic) -> Traffic:
        others = {name: found for name, found in traffic.rollouts.items() if name != model}
        return replace(traffic, rollouts=others if rolling is None else {**others, model: rolling})

    return change
