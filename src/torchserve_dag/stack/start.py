"""All that serves a project, started and stopped together: the front door, and TorchServe behind it."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torchserve_dag.archives.archive import Archive, ModelVersion, copies
from torchserve_dag.clients import Client
from torchserve_dag.front_door import start as front_door
from torchserve_dag.front_door.door import Door, FrontDoorRecord, Traffic
from torchserve_dag.front_door.envoy import DRAIN_S, LAST_S, LONGEST_DRAIN_S
from torchserve_dag.front_door.envoy import END_S as ENVOY_END_S
from torchserve_dag.front_door.routes_file import RouteFile
from torchserve_dag.front_door.splits import ServedVersion
from torchserve_dag.runtime.data.loopback import is_loopback
from torchserve_dag.server import defaults, processes, properties, releases_file, torchserve
from torchserve_dag.server.connect import torchserve_client
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.ports import Addresses, host_and_port
from torchserve_dag.server.ready import ReadinessCallback
from torchserve_dag.server.selection import Remark, differences, select
from torchserve_dag.server.state import Serving, State, TorchServeProcess
from torchserve_dag.server.supervised import ROLES, Supervised
from torchserve_dag.stack import settings

logger = logging.getLogger(__name__)

END_S = LONGEST_DRAIN_S + DRAIN_S + LAST_S + ENVOY_END_S + torchserve.STOP_S + 10
"""How long the keeper may take to drain and end everything."""


@dataclass(frozen=True, slots=True)
class Running:
    """What `start` started."""

    torchserve: TorchServeProcess
    front_door: FrontDoorRecord | None
    remarks: list[Remark]
    """What is to be said about archives: those that failed or were left out, and new ones."""


def start(
    root: Path,
    options: torchserve.StartOptions | None = None,
    progress: ReadinessCallback | None = None,
    *,
    with_front_door: bool = True,
    strict: bool = False,
) -> Running:
    """Start the front door and TorchServe, and wait until all that can be served is. Nobody watches them yet.

    Raises ServerError or CheckError if nothing can be served, or, if `strict`, not everything; then no process is left
    running, and the logs are kept.
    """
    options = options or torchserve.StartOptions()
    state = State(root)
    with state.lock():
        if runs(state):
            raise ServerError("A server of this project is running already: stop it with torchserve-dag down.")
        # Processes that outlived an earlier server may hold its ports.
        processes.kill(processes.family(state, {os.getpid()}))
        Door(state).forget()
        planned = torchserve.plan(root, options)
        store = torchserve.known(planned)
        serving_settings = settings.read(root, store.archives)
        routes = serving_settings.routes
        releases = releases_file.read(root)
        named = {(name, version) for name, route in routes.items() for version in route.named}
        selection = select(store, releases, named, copies(state.archives))
        remarks = [*selection.remarks, *differences(store, releases)]
        _check_enough(selection.archives, remarks, strict=strict)
        door_settings = serving_settings.front_door
        if with_front_door:
            _check_inside(planned.where)
            front_door.raise_open_files()
            if few := front_door.few_connections(door_settings):
                remarks.append(Remark("limited", "front door", few))
            door_settings = front_door.with_free_ports(door_settings) if options.free_ports else door_settings
            front_door.check_free(door_settings)
        state.prepare()
        archives, failed = torchserve.copy_all(state, selection.archives)
        remarks += [Remark("failed", " ".join(version), why) for version, why in failed.items()]
        _check_enough(archives, remarks, strict=strict)
        try:
            door = None
            if with_front_door:
                max_body = properties.max_body(planned.properties)
                door = front_door.start(root, door_settings, planned.where, max_body)
            # Versions come and go while TorchServe runs: with its management token, on this machine.
            inside = is_loopback(host_and_port(planned.where.management)[0])
            started = torchserve.start(
                state,
                planned,
                archives,
                options,
                progress,
                changes={"enable_model_api": "true"} if inside else {},
                shares=_shares(routes),
            )
            failures = {" ".join(version): why for version, why in started.failed.items()}
            remarks = [one for one in remarks if not (one.kind == "new" and one.what in failures)]
            remarks += [Remark("failed", what, why) for what, why in failures.items()]
            _check_enough(archives, remarks, strict=strict)
            if door:
                with torchserve_client(state) as serving:
                    open_door(state, serving, routes)
            Supervised(state).note("TorchServe", "")
            state.save_serving(Serving(with_front_door, options.access_log, options.timeout_s))
        except BaseException:  # also after Ctrl-C: a half-started server must not keep running
            Door(state).forget()
            torchserve.end(state, {os.getpid()})
            raise
    return Running(started.record, door, remarks)


def _check_enough(archives: Mapping[ModelVersion, Archive], remarks: Sequence[Remark], *, strict: bool) -> None:
    """Raises ServerError with all faults, if nothing can be served, or, if `strict`, if there are any."""
    faults = [remark for remark in remarks if remark.fault]
    if not archives or (strict and faults):
        raise ServerError("; ".join(f"{one}" for one in faults or remarks) + ".")


def runs(state: State) -> bool:
    """Whether a server was started and any of its processes runs: what is missing can be started again."""
    return any(one.running for one in Supervised(state).report())


def restart_torchserve(state: State, progress: ReadinessCallback | None = None) -> None:
    """Start TorchServe again, which has ended, with the versions that it served, and open the door to them.

    Meanwhile the door is closed. Raises ServerError; then TorchServe does not run. `progress` may raise, to give up.
    """
    supervised = Supervised(state)
    door = Door(state) if (state.serving() or Serving()).front_door else None
    if door:
        door.change(lambda now: replace(now, closed=True))
    others = [process.pid for role in ROLES if role != "TorchServe" and (process := supervised.process(role))]
    processes.kill(processes.family(state, others))  # workers outlive a Java that is killed
    traffic = door.traffic() if door else None
    served = {(one.model, one.version) for one in traffic.served} if traffic else None
    try:
        failed = torchserve.restart(state, served, progress, _shares(traffic.routes if traffic else {})).failed
        for version, why in failed.items():
            logger.error("%s is not served any more: %s", "/".join(version), why)
        if door:
            door.change(lambda now: replace(now, served=_without(now.served, failed), resting=(), closed=False))
    except BaseException:
        processes.kill(processes.family(state, others))
        raise
    supervised.note("TorchServe", "")


def _without(served: tuple[ServedVersion, ...], failed: Collection[ModelVersion]) -> tuple[ServedVersion, ...]:
    return tuple(one for one in served if (one.model, one.version) not in failed)


def _shares(routes: Mapping[str, RouteFile]) -> dict[str, Mapping[str, float]]:
    return {name: route.versions for name, route in routes.items()}


def stop(root: Path) -> bool:
    """Drain the front door, and stop every process of the project's server, whichever still run. False if none did."""
    state = State(root)
    if not state.folder.is_dir():
        return False
    with state.lock():
        ran = runs(state)
        state.forget_serving()  # the keeper and the watcher end everything
        supervised = Supervised(state)
        for role in ("watcher", "keeper"):
            process = supervised.process(role)
            processes.kill(processes.wait([process] if process else [], END_S))
        return end(state) or ran


def end(state: State, besides: Collection[int] = ()) -> bool:
    """Drain the front door, and end every process of the server but those of these pids. Returns whether any ran."""
    drained = front_door.stop(state)
    return torchserve.end(state, besides) or drained


def _check_inside(where: Addresses) -> None:
    """Raises ServerError if TorchServe would listen beyond loopback."""
    for name in where.__slots__:
        host, _ = host_and_port(getattr(where, name))
        if not is_loopback(host):
            raise ServerError(
                f"config.properties lets TorchServe listen at {host}, beyond this machine, where only the front door "
                "may listen (front_door.yaml): write 127.0.0.1 in config.properties."
            )


def open_door(state: State, serving: Client, routes: Mapping[str, RouteFile]) -> Traffic:
    """Route requests to every version that TorchServe serves. A model whose default is not served has none."""
    models, store, releases = serving.models(), state.archives, releases_file.read(state.root)
    served = tuple(
        ServedVersion.of(model.name, version, store / version.archive) for model in models for version in model.versions
    )
    decided = {name: release.default.version for name, release in releases.items() if release.default}
    chosen = {
        model.name: model.default.version
        for model in models
        if decided.get(model.name, model.default.version) == model.default.version
    }
    return Door(state).change(
        lambda now: replace(now, served=served, defaults=chosen, routes=dict(routes), closed=False)
    )


def set_default(root: Path, name: str, version: str) -> None:
    """Set the version that answers requests without a version, now and after restarts. Raises ServerError."""
    state = State(root)
    door = Door(state)
    if door.record() and name in door.traffic().routes:
        raise ServerError(f"routes.yaml says which version of {name} answers: change it, and run torchserve-dag routes")
    with torchserve_client(state) as serving:
        defaults.set_default(state, serving, name, version, "torchserve-dag default")
    if door.record():
        door.change(lambda now: replace(now, defaults={**now.defaults, name: version}))
