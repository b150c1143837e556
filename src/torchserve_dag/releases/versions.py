"""Bring a version of a model into the running server, and retire one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torchserve_dag.archives.archive import Archive, ModelVersion, UnusableArchiveError, copies, copy, read_store
from torchserve_dag.clients import Client, VersionInfo
from torchserve_dag.clients.models import version_key
from torchserve_dag.front_door.door import Door, Traffic
from torchserve_dag.front_door.envoy_config import GUARDED, PROTOCOLS, cluster_name, stat_name
from torchserve_dag.front_door.splits import ServedVersion
from torchserve_dag.releases.load_throttle import LoadThrottle
from torchserve_dag.server import defaults, launch, processes, releases_file
from torchserve_dag.server.connect import running
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.logs import Logs
from torchserve_dag.server.ready import Readiness, StartupWait, wait_until_ready
from torchserve_dag.server.releases_file import ModelReleases
from torchserve_dag.server.selection import differences
from torchserve_dag.server.state import State

EMPTY_S = 120.0
"""How long requests in flight may take before a version is retired; its own timeout is shorter."""


def load(
    state: State, client: Client, model: str, version: str, timeout_s: float, check: Callable[[], object] | None = None
) -> Archive:
    """Register a version from the model store, and wait until its model is loaded and warm; the copy that is served.

    `check` is called repeatedly meanwhile, and may raise to give up. Raises ServerError with the worker's error if the
    version does not become ready. In both cases the version is unregistered again.
    """
    record = running(state)
    in_store = find_archive(state, model, version)
    try:
        archive = copy(in_store, state.archives)
    except UnusableArchiveError as error:
        raise ServerError(f"{in_store.path} {error}.") from None
    wait = _load_direct if record.host == "direct" else _load_torchserve
    try:
        failed = wait(state, client, archive, timeout_s, check or (lambda: None))
    except BaseException:
        _discard(client, archive)
        raise
    if failed:
        _discard(client, archive)
        raise ServerError(f"{failed[model, version]}.")
    info = next(one for one in _versions(client, model) if one.version == version)
    served = ServedVersion.of(model, version, info.response_timeout_s, archive.path)
    door = Door(state)
    if door.record():
        door.change(lambda now: replace(now, served=(*now.served, served)))
    return archive


def _load_direct(
    _: State, client: Client, archive: Archive, timeout_s: float, check: Callable[[], object]
) -> dict[ModelVersion, str]:
    client.register(archive.path.name, timeout=timeout_s)

    def progress(_: list[Readiness]) -> None:
        check()

    return wait_until_ready(client, [(archive.name, archive.version)], timeout_s, progress)


def _load_torchserve(
    state: State, client: Client, archive: Archive, timeout_s: float, check: Callable[[], object]
) -> dict[ModelVersion, str]:
    record, logs = running(state), Logs(state.logs)
    waiting = StartupWait({(archive.name, archive.version): archive.path.name}, logs, failures=1)
    java = processes.java(record, state)
    if java is None:
        raise ServerError(f"TorchServe ended: {logs.server_failure() or 'its log gives no reason'}.")
    client.register(archive.path.name, timeout=timeout_s)
    with LoadThrottle(java) as throttle:

        def progress(seen: list[Readiness]) -> None:
            throttle.assign(worker for one in seen for worker in one.loading)
            check()

        return waiting.wait(client, lambda: processes.java(record, state), timeout_s, progress)


def _discard(client: Client, archive: Archive) -> None:
    launch.unregister(client, archive.name, archive.version)
    archive.path.unlink(missing_ok=True)


def serve(
    state: State,
    client: Client,
    model: str,
    version: str | None,
    timeout_s: float,
    reason: str = "torchserve-dag serve",
) -> tuple[str, bool]:
    """Bring a version into the running server, and into every later start; None for the highest.

    The first version of a model becomes its default. Returns the version, and whether it is the default. Raises
    ServerError; then nothing has changed.
    """
    version = version or _highest(state, model)
    if version in {one.version for one in _versions(client, model)}:
        archive = find_archive(state, model, version)
    else:
        archive = load(state, client, model, version, timeout_s)
    release = releases_file.read(state.root).get(model)
    default = release.default.version if release and release.default else None
    if default not in {None, version}:
        if not (release and version in release.served):
            releases_file.decide(state, "served", model, version, archive.hash, reason)
        return version, False
    client.set_default(model, version)
    if default is None:
        releases_file.decide(state, "default", model, version, archive.hash, reason)
    door = Door(state)
    if door.record():
        door.change(lambda now: replace(now, defaults={**now.defaults, model: version}))
    return version, True


def _highest(state: State, model: str) -> str:
    """The highest version in the store that was not retired or rejected. Raises ServerError."""
    store = read_store(Path(running(state).store))
    release = releases_file.read(state.root).get(model, ModelReleases())
    versions = {version for name, version in store.archives if name == model} - {*release.retired, *release.rejected}
    if not versions:
        find_archive(state, model, "")
        raise ServerError(
            f"Every version of {model} was retired or rejected: name one, torchserve-dag serve {model}/VERSION."
        )
    return defaults.highest(versions)


def retire(state: State, client: Client, model: str, version: str) -> None:
    """Unregister a version that no route uses, after its requests in flight are answered; no later start loads it.

    Raises ServerError.
    """
    door = Door(state)
    traffic = door.traffic()
    _check_unused(traffic, model, version)
    leaves = next(one for one in traffic.served if (one.model, one.version) == (model, version))
    door.change(lambda now: replace(now, served=_without(now.served, leaves), leaving=(*now.leaving, leaves)))
    try:
        _wait_empty(door, leaves)
        if traffic.defaults.get(model) == version and model in traffic.routes:
            weights = traffic.routes[model].versions
            other = max(weights, key=lambda one: weights[one])
            defaults.set_default(state, client, model, other, f"{version} was retired")
            door.change(lambda now: replace(now, defaults={**now.defaults, model: other}))
        launch.unregister(client, model, version)
    except BaseException:  # also after Ctrl-C
        door.change(lambda now: replace(now, served=(*now.served, leaves), leaving=_without(now.leaving, leaves)))
        raise
    door.change(lambda now: replace(now, leaving=_without(now.leaving, leaves)))
    archive = copies(state.archives).get((model, version))
    releases_file.decide(state, "retired", model, version, archive.hash if archive else "", "torchserve-dag retire")
    if archive:
        archive.path.unlink(missing_ok=True)


def _without(versions: tuple[ServedVersion, ...], one: ServedVersion) -> tuple[ServedVersion, ...]:
    return tuple(other for other in versions if other != one)


def find_archive(state: State, model: str, version: str) -> Archive:
    """The archive of a version in the store of the running server.

    Raises ServerError if there is none, or if its content is not what was decided on, or what is served.
    """
    folder, key = Path(running(state).store), (model, version)
    store = read_store(folder)
    found = store.archives.get(key, ())
    if not found:
        known = ", ".join(sorted((one for name, one in store.archives if name == model), key=version_key))
        which = f"{model}/{version}" if version else model
        raise ServerError(
            f"There is no archive of {which} in {folder} (only {known or 'other models'}): build it first."
        )
    for remark in differences(store, releases_file.read(state.root), copies(state.archives)):
        if remark.what == f"{model} {version}":
            raise ServerError(f"{remark}.")
    if len(found) > 1:
        files = " and ".join(one.path.name for one in found)
        raise ServerError(f"{files} in {folder} are {model}/{version}, and differ: delete all but one.")
    return found[0]


def _versions(client: Client, model: str) -> tuple[VersionInfo, ...]:
    return next((one.versions for one in client.models() if one.name == model), ())


def _check_unused(traffic: Traffic, model: str, version: str) -> None:
    split = traffic.split(model)
    if split is None or not any(one.version == version for one in traffic.served if one.model == model):
        raise ServerError(f"{model}/{version} is not served.")
    shared = version in dict(split.weights) and (model in traffic.routes or model in traffic.rollouts)
    uses = ["it has a share in routes.yaml, or in a rollout"] if shared else []
    uses += [f'the rule "{rule}" names it' for rule, one in split.route.always.items() if one == version]
    uses += ["it is a shadow"] if version in split.route.shadow else []
    uses += ["it is the fallback"] if version == split.fallback else []
    uses += ["it is the default"] if model not in traffic.routes and traffic.defaults.get(model) == version else []
    if uses:
        raise ServerError(f"{model}/{version} cannot be retired: {' and '.join(uses)}.")


def _wait_empty(door: Door, one: ServedVersion) -> None:
    deadline = time.monotonic() + EMPTY_S
    names = [cluster_name(protocol, one) + suffix for protocol in PROTOCOLS for suffix in ("", GUARDED)]
    while any(_in_flight(door, name) for name in names):
        if time.monotonic() > deadline:
            raise ServerError(f"{one.name} still has requests in flight after {EMPTY_S:g} s, and stays in service.")
        time.sleep(0.05)


def _in_flight(door: Door, cluster: str) -> int:
    gauge = f"cluster.{stat_name(cluster)}.upstream_rq_active"
    return door.admin.stats(gauge.replace(".", "\\.").replace("?", "\\?")).get(gauge, 0)
