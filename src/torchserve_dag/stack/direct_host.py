"""Start and end the direct host: Envoy's own ports for it, its keys, what it is to serve. The keeper does the rest."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Collection, Mapping

from torchserve_dag.archives import atomic
from torchserve_dag.archives.archive import Archive, ModelVersion
from torchserve_dag.archives.protocol import why_not_hosted
from torchserve_dag.clients import Client, ServingError
from torchserve_dag.front_door.bootstrap import HostPorts
from torchserve_dag.server import defaults, processes, properties
from torchserve_dag.server.connect import management_client
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.hosted import Hosted, HostedFile, hosted_version
from torchserve_dag.server.launch import LaunchPlan, Started, StartOptions, keep_copies, unregister
from torchserve_dag.server.ready import ReadinessCallback, wait_until_ready
from torchserve_dag.server.state import ServerRecord, State
from torchserve_dag.server.supervised import Supervised
from torchserve_dag.stack import workers

KEYS_S = 365 * 86_400
POLL_S = 0.1
KEEPER_S = 30.0
"""How long the keeper may take until it answers."""


def ports(state: State, planned: LaunchPlan, *, access_log: bool = False) -> HostPorts:
    """Write new keys as TorchServe does, and say at which ports they count."""
    ends = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + KEYS_S))
    keys = {name: {"key": secrets.token_urlsafe(24), "expiration time": ends} for name in ("management", "inference")}
    atomic.write_private(state.key_file, json.dumps(keys, indent=2) + "\n")
    return HostPorts(planned.where, keys["inference"]["key"], access_log)


def refused(archives: Mapping[ModelVersion, Archive]) -> dict[ModelVersion, str]:
    """The archives that the direct host cannot run, each with the reason."""
    found = {version: why_not_hosted(archive.path) for version, archive in archives.items()}
    return {version: why.rstrip(".") for version, why in found.items() if why}


def prepare(state: State, planned: LaunchPlan, archives: Mapping[ModelVersion, Archive]) -> ServerRecord:
    """Record what is to be served: the keeper, which is started next, begins to load it."""
    properties.write(planned.source, state.config, properties.listening_at(planned.where))
    gpus = planned.properties.get("number_of_gpu", "")
    models = {name: [version for model, version in archives if model == name] for name, _ in archives}
    hosted = Hosted(
        tuple(hosted_version(archive, planned.properties) for archive in archives.values()),
        {name: defaults.highest(versions) for name, versions in models.items()},
        properties.max_body(planned.properties),
        int(gpus) if gpus.isdigit() else None,
    )
    HostedFile(state).change(lambda _: hosted)
    record = ServerRecord(0, planned.where, str(planned.store), "direct")
    state.save(record)
    return record


def wait(
    state: State,
    record: ServerRecord,
    archives: Mapping[ModelVersion, Archive],
    options: StartOptions,
    progress: ReadinessCallback | None,
    shares: Mapping[str, Mapping[str, float]],
) -> Started:
    """Wait until every version is ready or has failed, and set the default versions. Raises ServerError."""
    supervised, deadline = Supervised(state), time.monotonic() + KEEPER_S
    while supervised.process("keeper") is None or (serving := _client(state)) is None:
        if time.monotonic() > deadline:
            raise ServerError(f"The keeper does not start: see keeper.log in {state.logs}.")
        time.sleep(POLL_S)
    with serving:
        failed = wait_until_ready(serving, archives, options.timeout_s, progress)
        for version in failed:
            unregister(serving, *version)
        if len(failed) == len(archives):
            raise ServerError("; ".join(failed.values()) + ".")
        keep_copies(state, {version: archive for version, archive in archives.items() if version not in failed})
        defaults.apply(state, serving, shares)
    return Started(record, failed)


def _client(state: State) -> Client | None:
    """A client of the keeper's, if that answers."""
    try:
        client = management_client(state)
    except ServerError:
        return None
    try:
        client.models(timeout=5)
    except ServingError:
        client.close()
        return None
    return client


def end(state: State, besides: Collection[int] = ()) -> bool:
    """End every worker, and whatever else runs of the project's server, without the pids `besides`."""
    workers.end_all(state)
    ran = processes.end_family(state, besides)
    state.clear()
    return ran
