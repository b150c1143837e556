"""Start TorchServe for a project, wait until it is ready, and stop it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from torchserve_dag.archives import atomic
from torchserve_dag.archives.archive import Archive, ModelVersion, copies
from torchserve_dag.clients import KeyFile
from torchserve_dag.server import defaults, java, ports, processes, properties
from torchserve_dag.server.connect import management_client
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.launch import LaunchPlan, Started, StartOptions, keep_copies, unregister
from torchserve_dag.server.logs import Logs
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.ready import ReadinessCallback, StartupWait
from torchserve_dag.server.state import ServerRecord, State
from torchserve_dag.server.supervised import Supervised

LONGEST_SOCKET = 103
"""The longest path of a Unix socket in bytes: 103 on macOS, 107 on Linux."""
START_S = 60.0
"""How long TorchServe's command may take, and TorchServe until it has written its keys."""
STOP_S = 20.0
"""How long TorchServe may take to shut down; it takes about three seconds."""
_FIXED = {
    "disable_token_authorization": "false",
    "token_expiration_min": "525600",  # tokens are not renewed: after this time every client would be refused
    "enable_envvars_config": "false",
}
"""Properties that `up` sets, whatever the project's file says (`config_keys.py`)."""
_STARTER = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_DFL)
from ts.model_server import start
start()
"""
"""TorchServe's own command. Java and its workers inherit that SIGTERM is ignored: a SIGTERM to every process at once
(systemd, docker) must not end them before the front door is drained. `end` sends SIGINT, which Java obeys too."""


def start(
    state: State,
    planned: LaunchPlan,
    archives: Mapping[ModelVersion, Archive],
    options: StartOptions,
    progress: ReadinessCallback | None = None,
    *,
    changes: Mapping[str, str] | None = None,
    shares: Mapping[str, Mapping[str, float]] | None = None,
) -> Started:
    """Start TorchServe with these copies of archives, wait until it serves them, and set the default versions.

    A version that fails is unregistered; if none is left, or if TorchServe ends, raises ServerError. `changes` are
    properties that override those of the project; `shares` are those of `routes.yaml`.
    """
    files = {version: archive.path.name for version, archive in archives.items()}
    listening = {**properties.listening_at(planned.where), **_sockets(state, planned.where)}
    changes = {**listening, **_FIXED, **(changes or {}), "load_models": ",".join(files.values())}
    properties.write(planned.source, state.config, changes)
    open(state.logs / "console.log", "wb", opener=atomic.private).close()  # now: `logs` begins with what comes after
    logs = Logs(state.logs)
    record = _launch(state, planned, logs, access_log=options.access_log)
    state.save(record)
    Supervised(state).started("TorchServe", record.pid, "loads its models")
    with management_client(state) as serving:
        waiting = StartupWait(files, logs)
        failed = waiting.wait(
            serving,
            lambda: processes.java(record, state),
            options.timeout_s,
            progress,
            lambda version: unregister(serving, *version),
        )
        if len(failed) == len(files):
            raise ServerError("; ".join(failed.values()) + ".")
        keep_copies(state, {version: archive for version, archive in archives.items() if version not in failed})
        defaults.apply(state, serving, shares or {})
    return Started(record, dict(failed))


def restart(
    state: State,
    served: Collection[ModelVersion] | None,
    progress: ReadinessCallback | None = None,
    shares: Mapping[str, Mapping[str, float]] | None = None,
) -> Started:
    """Start TorchServe again as it was started, after it has ended, with the versions that it `served` in the end.

    None for all of which it has a copy. Raises ServerError.
    """
    record, serving = state.record(), state.serving()
    if record is None or serving is None:
        raise ServerError("There is no TorchServe to start again: start it with torchserve-dag up.")
    state.clear_torchserve()
    own = copies(state.archives)
    archives = {version: archive for version, archive in own.items() if served is None or version in served}
    planned = LaunchPlan(state.config, properties.read(state.config), Path(record.store), record.addresses)
    options = StartOptions(access_log=serving.access_log, timeout_s=serving.timeout_s)
    return start(state, planned, archives, options, progress, shares=shares)


def end(state: State, besides: Collection[int] = ()) -> bool:
    """Stop TorchServe and every process of the project's server, without those of the pids `besides`.

    Returns whether any ran. Raises ServerError.
    """
    record = state.record()
    process = processes.java(record, state) if record else None
    if process:
        with suppress(psutil.Error):  # it has just ended
            process.send_signal(signal.SIGINT)
        processes.wait([process], STOP_S)
    ran = processes.end_family(state, besides)  # only now: TorchServe may start processes while it shuts down
    state.clear()
    return process is not None or ran


def _sockets(state: State, where: Addresses) -> dict[str, str]:
    """Workers listen at Unix sockets in the state folder, or at ports if its path is too long for a socket."""
    if len(os.fsencode(state.tmp / ".ts.sock.99999")) <= LONGEST_SOCKET:
        return {}
    host, _ = ports.host_and_port(where.inference)
    return {"use_native_io": "false", "initial_worker_port": str(ports.free_run(host, 50))}


def _launch(state: State, planned: LaunchPlan, logs: Logs, *, access_log: bool) -> ServerRecord:
    command = [sys.executable, "-c", _STARTER, "--start", "--ncs"]
    command += ["--ts-config", state.config.name, "--model-store", str(state.archives)]
    begun = time.time()
    with open(state.logs / "console.log", "ab", opener=atomic.private) as console:
        starter = subprocess.Popen(  # noqa: S603 (our own arguments)
            command,
            cwd=state.folder,
            env=_environment(state, java.find(), access_log=access_log),
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in this terminal must not stop the server
        )
        try:
            starter.wait(START_S)
        except subprocess.TimeoutExpired:
            processes.kill(processes.family(state))
            starter.kill()
            starter.wait()
            raise ServerError(f"TorchServe's command did not end within {START_S:g} s.") from None
    try:  # TorchServe's command ends once Java runs, and writes its pid into this file
        pid = int((state.tmp / ".model_server.pid").read_text("utf-8"))
        record = ServerRecord(pid, planned.where, str(planned.store))
    except (OSError, ValueError):
        raise ServerError(f"TorchServe did not start: {logs.server_failure() or 'its log gives no reason'}.") from None
    while not _has_keys(state):
        if processes.java(record, state) is None or time.time() > begun + START_S:
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
    charset = next((environment[key] for key in ("LC_ALL", "LC_CTYPE", "LANG") if environment.get(key)), "")
    if not charset.lower().replace("-", "").endswith("utf8"):
        environment["LC_ALL"] = "C.UTF-8"  # else Java finds no file whose path has a letter beyond ASCII
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
