"""All that serves a project, started and stopped together: the front door, and a host behind it."""

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
from torchserve_dag.front_door.settings import FrontDoor
from torchserve_dag.front_door.splits import ServedVersion
from torchserve_dag.gateway.process import Gateway
from torchserve_dag.runtime.data.loopback import is_loopback
from torchserve_dag.server import defaults, java, launch, processes, properties, releases_file, torchserve
from torchserve_dag.server.connect import management_client
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.ports import Addresses, host_and_port
from torchserve_dag.server.ready import ReadinessCallback
from torchserve_dag.server.selection import Remark, differences, select
from torchserve_dag.server.state import Host, ServerRecord, Serving, State
from torchserve_dag.server.supervised import ROLES, Supervised
from torchserve_dag.stack import direct_host, settings, supervise

logger = logging.getLogger(__name__)

END_S = LONGEST_DRAIN_S + DRAIN_S + LAST_S + ENVOY_END_S + torchserve.STOP_S + 10
"""How long the keeper may take to drain and end everything."""


@dataclass(frozen=True, slots=True)
class Running:
    """What `start` started."""

    server: ServerRecord
    front_door: FrontDoorRecord | None
    remarks: list[Remark]
    """What is to be said about archives: those that failed or were left out, and new ones."""


def start(
    root: Path,
    options: launch.StartOptions | None = None,
    progress: ReadinessCallback | None = None,
    *,
    host: Host | None = None,
    with_front_door: bool = True,
    strict: bool = False,
) -> Running:
    """Start the front door and the host, and wait until all that can be served is. Nobody watches TorchServe yet.

    `host` is that of `torchserve-dag.yaml` where it is None.

    Raises ServerError or CheckError if nothing can be served, or, if `strict`, not everything; then no process is left
    running, and the logs are kept.
    """
    options = options or launch.StartOptions()
    state = State(root)
    with state.lock():
        if runs(state):
            raise ServerError("A server of this project is running already: stop it with torchserve-dag down.")
        # Processes that outlived an earlier server may hold its ports.
        processes.kill(processes.family(state, {os.getpid()}))
        Door(state).forget()
        planned = launch.plan(root, options)
        store = launch.known(planned)
        serving_settings = settings.read(root, store.archives)
        routes = serving_settings.routes
        releases = releases_file.read(root)
        named = {(name, version) for name, route in routes.items() for version in route.named}
        selection = select(store, releases, named, copies(state.archives))
        remarks = [*selection.remarks, *differences(store, releases)]
        _check_enough(selection.archives, remarks, strict=strict)
        door_settings = serving_settings.front_door
        chosen = host or serving_settings.project.host
        if with_front_door:
            _check_inside(planned.where)
        if with_front_door or chosen == "direct":
            front_door.raise_open_files()
            if few := front_door.few_connections(door_settings):
                remarks.append(Remark("limited", "front door", few))
        if with_front_door:
            door_settings = front_door.with_free_ports(door_settings) if options.free_ports else door_settings
            front_door.check_free(door_settings)
        state.prepare()
        archives, failed = launch.copy_all(state, selection.archives)
        remarks += [Remark("failed", " ".join(version), why) for version, why in failed.items()]
        _check_enough(archives, remarks, strict=strict)
        to_serve = Serving(
            with_front_door,
            options.access_log,
            options.timeout_s,
            host=chosen,
            vllm_metrics=serving_settings.project.vllm_metrics,
        )
        begin = _begin_direct if chosen == "direct" else _begin_torchserve
        try:
            started, door = begin(_Start(state, planned, archives, options, progress, door_settings, routes, to_serve))
            failures = {" ".join(version): why for version, why in started.failed.items()}
            remarks = [one for one in remarks if not (one.kind == "new" and one.what in failures)]
            remarks += [Remark("failed", what, why) for what, why in failures.items()]
            _check_enough(archives, remarks, strict=strict)
            if door:
                with management_client(state) as serving:
                    open_door(state, serving, routes)
            if chosen == "torchserve":
                Supervised(state).note("TorchServe", "")
            state.save_serving(to_serve)
        except BaseException:  # also after Ctrl-C: a half-started server must not keep running
            Door(state).forget()
            _end_processes(state, {os.getpid()})
            raise
    return Running(started.record, door, remarks)


@dataclass(frozen=True, slots=True)
class _Start:
    """All that is known before the first process is started."""

    state: State
    planned: launch.LaunchPlan
    archives: Mapping[ModelVersion, Archive]
    """The server's copies."""
    options: launch.StartOptions
    progress: ReadinessCallback | None
    door_settings: FrontDoor
    routes: Mapping[str, RouteFile]
    serving: Serving


def _begin_torchserve(this: _Start) -> tuple[launch.Started, FrontDoorRecord | None]:
    """Start the front door and TorchServe. Nobody watches them yet."""
    java.find()  # raises before anything is started
    planned = this.planned
    door = None
    if this.serving.front_door:
        max_body = properties.max_body(planned.properties)
        Gateway(this.state).start()
        door = front_door.start(this.state.root, this.door_settings, planned.where, max_body)
    # Versions come and go while TorchServe runs: with its management token, on this machine.
    inside = is_loopback(host_and_port(planned.where.management)[0])
    changes = {"enable_model_api": "true"} if inside else {}
    started = torchserve.start(
        this.state,
        planned,
        this.archives,
        this.options,
        this.progress,
        changes=changes,
        shares=_shares(this.routes),
    )
    if door:
        Gateway(this.state).wait()
    return started, door


def _begin_direct(this: _Start) -> tuple[launch.Started, FrontDoorRecord | None]:
    """Start Envoy, the watcher and the keeper, which starts the workers."""
    state, planned = this.state, this.planned
    refused = direct_host.refused(this.archives)
    archives = {version: archive for version, archive in this.archives.items() if version not in refused}
    if not archives:
        raise ServerError("; ".join(refused.values()) + ".")
    max_body = properties.max_body(planned.properties)
    own = direct_host.ports(state, planned, access_log=this.options.access_log)
    state.save_serving(replace(this.serving, opened=False))
    Gateway(state).start()
    door = front_door.start(state.root, this.door_settings, planned.where, max_body, own, tls=this.serving.front_door)
    record = direct_host.prepare(state, planned, archives)
    supervise.start(state)
    started = direct_host.wait(state, record, archives, this.options, this.progress, _shares(this.routes))
    Gateway(state).wait()
    return replace(started, failed=refused | started.failed), door


def _check_enough(archives: Mapping[ModelVersion, Archive], remarks: Sequence[Remark], *, strict: bool) -> None:
    """Raises ServerError with all faults, if nothing can be served, or, if `strict`, if there are any."""
    faults = [remark for remark in remarks if remark.fault]
    if not archives or (strict and faults):
        raise ServerError("; ".join(f"{one}" for one in faults or remarks) + ".")


def runs(state: State) -> bool:
    """Whether a server was started and any of its processes runs: what is missing can be started again."""
    return any(one.running for one in Supervised(state).report())


def end_half_started(root: Path) -> None:
    """End a server whose `up` was killed before it opened the door. Raises ServerError while that `up` runs."""
    serving = State(root).serving()
    if serving and not serving.opened:
        stop(root)


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
        return _end_processes(state) or ran


def _end_processes(state: State, besides: Collection[int] = ()) -> bool:
    """Have the keeper and the watcher end everything; end whatever they leave. Returns whether any ran."""
    state.forget_serving()
    supervised = Supervised(state)
    for role in ("watcher", "keeper"):
        process = supervised.process(role)
        processes.kill(processes.wait([process] if process else [], END_S))
    return end(state, besides)


def end(state: State, besides: Collection[int] = ()) -> bool:
    """Drain the front door, and end every process of the server but those of these pids. Returns whether any ran."""
    record = state.record()
    drained = front_door.stop(state)
    Gateway(state).end()
    host = direct_host if record and record.host == "direct" else torchserve
    return host.end(state, besides) or drained


def _check_inside(where: Addresses) -> None:
    """Raises ServerError if the host would listen beyond loopback."""
    for name in where.__slots__:
        host, _ = host_and_port(getattr(where, name))
        if not is_loopback(host):
            raise ServerError(
                f"config.properties lets the host listen at {host}, beyond this machine, where only the front door "
                "may listen (front_door.yaml): write 127.0.0.1 in config.properties."
            )


def open_door(state: State, serving: Client, routes: Mapping[str, RouteFile]) -> Traffic:
    """Route requests to every version that the host serves. A model whose default is not served has none."""
    models, store, releases = serving.models(), state.archives, releases_file.read(state.root)
    served = tuple(
        ServedVersion.of(model.name, one.version, one.response_timeout_s, store / one.archive)
        for model in models
        for one in model.versions
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
    with management_client(state) as serving:
        defaults.set_default(state, serving, name, version, "torchserve-dag default")
    if door.record():
        door.change(lambda now: replace(now, defaults={**now.defaults, name: version}))
