"""Start TorchServe for a project, wait until it is ready, and stop it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

from torchserve_dag.archives import atomic, mar
from torchserve_dag.clients import KeyFile
from torchserve_dag.server import defaults, java, ports, processes, properties
from torchserve_dag.server.connect import torchserve_client
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.logs import Logs
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.ready import ModelVersion, ReadinessCallback, StartupWait
from torchserve_dag.server.state import State, TorchServeProcess

LONGEST_SOCKET = 103
"""The longest path of a Unix socket in bytes: 103 on macOS, 107 on Linux."""
STOP_S = 20.0
"""How long TorchServe may take to shut down; it takes about three seconds."""


@dataclass(frozen=True, slots=True)
class StartOptions:
    """The options of `up`; all other settings are in `config.properties`."""

    port: int | None = None
    grpc_port: int | None = None
    free_ports: bool = False
    store: Path | None = None
    """The folder of archives; None for the project's `model_store`."""
    access_log: bool = False
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """A checked configuration that TorchServe can be started with."""

    source: Path
    """The project's `config.properties`, or the default."""
    properties: dict[str, str]
    """The content of that file."""
    store: Path
    archives: dict[ModelVersion, str]
    where: Addresses
    java_home: Path


def plan(root: Path, options: StartOptions, retired: Collection[ModelVersion] = ()) -> LaunchPlan:
    """Check the project's configuration. All archives except the `retired` will be served. Raises ServerError."""
    source = properties.find(root)
    configured = properties.read(source)
    store = (options.store or root / configured.get("model_store", "model_store")).resolve()
    archives = {version: archive for version, archive in _archives(store).items() if version not in retired}
    where = _addresses(configured, options)
    where.check_free()
    return LaunchPlan(source, configured, store, archives, where, java.find())


def start(
    state: State,
    planned: LaunchPlan,
    options: StartOptions,
    progress: ReadinessCallback | None = None,
    *,
    changes: Mapping[str, str] | None = None,
) -> TorchServeProcess:
    """Start TorchServe, wait until it serves every archive, and set the default versions. Raises ServerError.

    `changes` are properties that override those of the project.
    """
    changes = {**properties.listening_at(planned.where), **_sockets(state, planned.where), **(changes or {})}
    if planned.properties.get("load_models") == "all":  # some archives in the store may be retired
        changes["load_models"] = ",".join(planned.archives.values())
    properties.write(planned.source, state.config, changes)
    logs = Logs(state.logs)
    record = _launch(state, planned, logs, access_log=options.access_log)
    state.save(record)
    with torchserve_client(state) as serving:
        waiting = StartupWait(planned.archives, logs)
        waiting.wait(serving, lambda: processes.java(record, state) is not None, options.timeout_s, progress)
        defaults.apply(state, serving)
    return record


def end(state: State) -> bool:
    """Stop TorchServe and every process of the project's server. Returns whether it ran. Raises ServerError."""
    record = state.record()
    process = processes.java(record, state) if record else None
    if process:
        process.terminate()
        processes.wait([process], STOP_S)
    family = processes.family(state)  # read only now: TorchServe may start processes while it shuts down
    processes.kill(left := processes.wait(family, 1.0))
    if processes.wait(left, 5.0):
        pids = ", ".join(str(survivor.pid) for survivor in left)
        raise ServerError(f"These processes of the server do not end: {pids}.")
    state.clear()
    return process is not None


def refuse_second(state: State) -> None:
    """Raises ServerError if a server of this project is running."""
    record = state.record()
    if record and processes.java(record, state):
        raise ServerError(
            f"A server of this project is running already (pid {record.pid}, {record.addresses.inference}): "
            "stop it with torchserve-dag down."
        )


def _archives(store: Path) -> dict[ModelVersion, str]:
    """The archives in a store: (model, version) → file. Raises ServerError."""
    archives: dict[ModelVersion, str] = {}
    for path in sorted(store.glob("[!.]*.mar")):
        try:
            key = mar.name_and_version(path)
        except (BadZipFile, OSError, ValueError, KeyError, TypeError):
            raise ServerError(f"{path} is not an archive: delete it, or build it again.") from None
        if key in archives:
            raise ServerError(f"{archives[key]} and {path.name} are both {' '.join(key)}: delete one of them.")
        archives[key] = path.name
    if not archives:
        raise ServerError(f"There are no archives in {store}: build them with torchserve-dag build.")
    return archives


def _addresses(configured: dict[str, str], options: StartOptions) -> Addresses:
    where = properties.addresses(configured).with_ports(options.port, options.grpc_port)
    return where.with_free_ports() if options.free_ports else where


def _sockets(state: State, where: Addresses) -> dict[str, str]:
    """Workers listen at Unix sockets in the state folder, or at ports if its path is too long for a socket."""
    if len(os.fsencode(state.tmp / ".ts.sock.99999")) <= LONGEST_SOCKET:
        return {}
    host, _ = ports.host_and_port(where.inference)
    return {"use_native_io": "false", "initial_worker_port": str(ports.free_run(host, 50))}


def _launch(state: State, planned: LaunchPlan, logs: Logs, *, access_log: bool) -> TorchServeProcess:
    command = [sys.executable, "-m", "ts.model_server", "--start", "--ncs"]
    command += ["--ts-config", state.config.name, "--model-store", str(planned.store)]
    begun = time.time()
    with open(state.logs / "console.log", "wb", opener=atomic.private) as console:
        starter = subprocess.Popen(  # noqa: S603 (our own arguments)
            command,
            cwd=state.folder,
            env=_environment(state, planned.java_home, access_log=access_log),
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in this terminal must not stop the server
        )
        starter.wait()
    try:  # TorchServe's command ends once Java runs, and writes its pid into this file
        pid = int((state.tmp / ".model_server.pid").read_text("utf-8"))
        record = TorchServeProcess(pid, planned.where, str(planned.store))
    except (OSError, ValueError):
        raise ServerError(f"TorchServe did not start: {logs.server_failure() or 'its log gives no reason'}.") from None
    while not _has_keys(state):
        if processes.java(record, state) is None or time.time() > begun + 60:
            processes.kill(processes.family(state))
            raise ServerError(f"TorchServe did not start: {logs.server_failure() or 'its log gives no reason'}.")
        time.sleep(0.05)
    return record


def _has_keys(state: State) -> bool:
    try:
        KeyFile.read(state.key_file)
    except (OSError, ValueError):  # not written yet, or incomplete
        return False
    return True


def _environment(state: State, java_home: Path, *, access_log: bool) -> dict[str, str]:
    environment = {
        key: value for key, value in os.environ.items() if key != "TS_CONFIG_FILE"
    }  # it would override --ts-config
    return {
        **environment,
        **processes.mark(state),
        "JAVA_HOME": str(java_home),
        "TEMP": str(state.tmp),
        "TMPDIR": str(state.tmp),
        "LOG_LOCATION": str(state.logs),
        "METRICS_LOCATION": str(state.logs),
        "TS_CONSOLE_LOG": "OFF",  # console.log is not rotated, and ts_log.log has the same lines
        "TS_ACCESS_LOG": "INFO" if access_log else environment.get("TS_ACCESS_LOG", "OFF"),
    }
