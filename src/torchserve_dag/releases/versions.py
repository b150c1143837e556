"""Load a version of a model into the running server, and retire one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torchserve_dag.archives import mar
from torchserve_dag.clients import Client, ModelNotFound, ServingError, VersionInfo
from torchserve_dag.front_door.door import Door, Traffic
from torchserve_dag.front_door.envoy_config import GUARDED, PROTOCOLS, cluster_name, stat_name
from torchserve_dag.front_door.splits import ServedVersion
from torchserve_dag.releases.load_throttle import LoadThrottle
from torchserve_dag.server import defaults, processes
from torchserve_dag.server.connect import running
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.logs import Logs
from torchserve_dag.server.ready import Readiness, StartupWait
from torchserve_dag.server.state import State

EMPTY_S = 120.0
"""How long requests in flight may take before a version is retired; its own timeout is shorter."""


def load(
    state: State, client: Client, model: str, version: str, timeout_s: float, check: Callable[[], object] | None = None
) -> None:
    """Register a version from the model store, and wait until its model is loaded and warm.

    `check` is called repeatedly meanwhile, and may raise to give up. Raises ServerError with the worker's error if the
    version does not become ready. In both cases the version is unregistered again.
    """
    record = running(state)
    archive = find_archive(Path(record.store), model, version)
    logs = Logs(state.logs)
    waiting = StartupWait({(model, version): archive.name}, logs, failures=1)
    java = processes.java(record, state)
    if java is None:
        raise ServerError(f"TorchServe ended: {logs.server_failure() or 'its log gives no reason'}.")
    try:
        client.register(archive.name, timeout=timeout_s)
        with LoadThrottle(java) as throttle:

            def progress(seen: list[Readiness]) -> None:
                throttle.assign(worker for one in seen for worker in one.loading)
                if check:
                    check()

            waiting.wait(client, lambda: processes.java(record, state) is not None, timeout_s, progress)
    except BaseException:
        _unregister(client, model, version)
        raise
    info = next(one for one in _versions(client, model) if one.version == version)
    served = ServedVersion(
        model, version, float(info.response_timeout_s), mar.is_ours(archive), mar.is_asynchronous(archive)
    )
    state.save_retired(model, version, retired=False)
    Door(state).change(lambda now: replace(now, served=(*now.served, served)))


def retire(state: State, client: Client, model: str, version: str) -> None:
    """Unregister a version that no route uses, after its requests in flight are answered. Raises ServerError."""
    door = Door(state)
    traffic = door.traffic()
    _check_unused(traffic, model, version)
    leaves = next(one for one in traffic.served if (one.model, one.version) == (model, version))
    door.change(lambda now: replace(now, served=_without(now.served, leaves), leaving=(*now.leaving, leaves)))
    try:
        _wait_empty(door, leaves)
        if (
            traffic.defaults[model] == version
        ):  # TorchServe refuses to unregister its default version, even if routes.yaml splits all requests
            weights = traffic.routes[model].versions
            other = max(weights, key=lambda one: weights[one])
            defaults.set_default(state, client, model, other)
            door.change(lambda now: replace(now, defaults={**now.defaults, model: other}))
        _unregister(client, model, version)
    except BaseException:  # also after Ctrl-C
        door.change(lambda now: replace(now, served=(*now.served, leaves), leaving=_without(now.leaving, leaves)))
        raise
    door.change(lambda now: replace(now, leaving=_without(now.leaving, leaves)))


def _without(versions: tuple[ServedVersion, ...], one: ServedVersion) -> tuple[ServedVersion, ...]:
    return tuple(other for other in versions if other != one)


def find_archive(store: Path, model: str, version: str) -> Path:
    """The archive of a version. Raises ServerError if there is none."""
    archives = mar.versions_in(store)
    if (model, version) not in archives:
        known = ", ".join(one for name, one in archives if name == model) or "other models"
        raise ServerError(f"There is no archive of {model}/{version} in {store} (only {known}): build it first.")
    return archives[model, version]


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


def _unregister(client: Client, model: str, version: str) -> None:
    try:
        client.unregister(model, version)
    except ModelNotFound:
        return
    except ServingError as error:
        raise ServerError(f"TorchServe does not unregister {model}/{version}: {error}") from None
