"""Start a project's front door, and let it drain and end."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import replace
from pathlib import Path

from torchserve_dag.archives import atomic
from torchserve_dag.front_door import bootstrap, certificate, overload
from torchserve_dag.front_door.bootstrap import HostPorts
from torchserve_dag.front_door.door import Door, FrontDoorRecord
from torchserve_dag.front_door.envoy import BOOTSTRAP, LOG, Envoy
from torchserve_dag.front_door.settings import FrontDoor
from torchserve_dag.front_door.tokens import OWN
from torchserve_dag.server import ports
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.ports import Addresses, host_and_port
from torchserve_dag.server.state import State

START_S = 20.0
OWN_TOKEN = "own_token"  # noqa: S105 (a file's name)
OWN_LIFE_S = 365 * 86_400.0
OWN_REQUESTS_PER_SECOND = 100_000


def with_free_ports(settings: FrontDoor) -> FrontDoor:
    """The same hosts with free ports."""
    hosts = [host_and_port(address)[0] for address in (settings.listen, settings.metrics)]
    listen, metrics = (f"{host}:{port}" for host, port in zip(hosts, ports.free(hosts), strict=True))
    return replace(settings, listen=listen, metrics=metrics)


def raise_open_files() -> None:
    """Let this process, and those that it starts, open as many files as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def few_connections(settings: FrontDoor) -> str | None:
    """What to say where the system lets the front door take fewer connections than front_door.yaml says."""
    taken = overload.connections(settings.limits)
    if taken >= settings.limits.connections:
        return None
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"it takes {taken:,} connections, not {settings.limits.connections:,}, for a process may open {files:,} files "
        "here: raise the hard limit (ulimit -Hn, LimitNOFILE=), or write limits: connections: into front_door.yaml"
    )


def check_free(settings: FrontDoor) -> None:
    """Raises ServerError that names the owner of a port that is in use."""
    for address in (settings.listen, settings.metrics):
        problem = ports.why_not(*host_and_port(address))
        if problem:
            raise ServerError(
                f"{problem} for the front door: change it in front_door.yaml, or use --free-ports or --no-front-door."
            )


def start(
    root: Path, settings: FrontDoor, where: Addresses, max_body: int, own: HostPorts | None = None, *, tls: bool = True
) -> FrontDoorRecord:
    """Start the front door, before the host at `where`: it is closed until it is opened. Raises ServerError.

    `own` and `tls`: see bootstrap.
    """
    state = State(root)
    door, envoy = Door(state), Envoy(state)
    door.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    shown, key = certificate.files(root, settings, door.folder)
    _own_token(door)
    door.begin(where, direct=own is not None)
    door.show_certificate(shown, key)
    config = bootstrap.bootstrap(settings, door.folder, state.logs, door.tokens.key_set(), max_body, own, tls=tls)
    atomic.write_private(door.folder / BOOTSTRAP, json.dumps(config))
    envoy.start()
    record = FrontDoorRecord(settings, str(shown), str(key), tls)
    door.save(record)
    deadline = time.monotonic() + START_S
    while not envoy.listens():
        if not envoy.running() or time.monotonic() > deadline:
            raise ServerError(f"The front door did not start: {_why(state)}.")
        time.sleep(0.05)
    return record


def stop(state: State) -> bool:
    """Drain and end the front door if it runs. Returns whether it ran."""
    ran = Envoy(state).end()
    Door(state).forget()
    return ran


def own_token(state: State) -> str:
    """The token of this project's own commands. Raises ServerError."""
    try:
        return (state.front_door / OWN_TOKEN).read_text("utf-8")
    except OSError:
        raise ServerError(f"There is no {OWN_TOKEN} in {state.front_door}: start the server again.") from None


def _own_token(door: Door) -> None:
    """Issue a new token for this project's own commands, at each start."""
    if any(token.name == OWN for token in door.tokens.issued()):
        door.tokens.revoke(OWN)
    atomic.write_private(door.folder / OWN_TOKEN, door.tokens.issue(OWN, OWN_LIFE_S, OWN_REQUESTS_PER_SECOND))


def _why(state: State) -> str:
    path = state.logs / LOG
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    errors = [line for line in lines if "[critical]" in line or "Error" in line]
    return errors[-1].rpartition("] ")[2][:400] if errors else f"see {path}"
