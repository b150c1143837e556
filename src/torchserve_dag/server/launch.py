"""What is started: the project's configuration, checked, and the archives that are to be served, copied.

It is the same for either host (`ProjectSettings.host`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.archives.archive import Archive, ModelVersion, Store, UnusableArchiveError, copy, read_store
from torchserve_dag.clients import Client, ModelNotFound, ServingError
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.server import config_keys, defaults, properties
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.state import ServerRecord, State


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
    """A checked configuration that a host can be started with."""

    source: Path
    """The project's `config.properties`, or the default."""
    properties: dict[str, str]
    """The content of that file."""
    store: Path
    """The project's folder of archives."""
    where: Addresses


@dataclass(frozen=True, slots=True)
class Started:
    """A host that serves."""

    record: ServerRecord
    failed: dict[ModelVersion, str]
    """The versions that it does not serve, each with its reason."""


def plan(root: Path, options: StartOptions) -> LaunchPlan:
    """Check the project's configuration. Raises CheckError, ServerError."""
    source = properties.find(root)
    if found := config_keys.problems(source):
        raise CheckError(found)
    configured = properties.read(source)
    store = (options.store or root / configured.get("model_store", "model_store")).resolve()
    where = _addresses(configured, options)
    where.check_free()
    return LaunchPlan(source, configured, store, where)


def known(planned: LaunchPlan) -> Store:
    """The archives that may be served: those of the store that `load_models` names. Raises ServerError."""
    store = read_store(planned.store)
    names = planned.properties.get("load_models", "all")
    if names.lower() != "all":
        store = store.only({name.strip() for name in names.split(",") if name.strip()})
    if not store.archives and not store.unusable:
        raise ServerError(f"There are no archives in {planned.store}: build them with torchserve-dag build.")
    return store


def copy_all(
    state: State, archives: Mapping[ModelVersion, Archive]
) -> tuple[dict[ModelVersion, Archive], dict[ModelVersion, str]]:
    """The server's own copies of archives, and which could not be copied, with the reason. Other copies are deleted."""
    copied, failed = dict[ModelVersion, Archive](), dict[ModelVersion, str]()
    for version, archive in archives.items():
        try:
            copied[version] = copy(archive, state.archives)
        except UnusableArchiveError as error:
            failed[version] = f"{archive.path} {error}"
    keep_copies(state, copied)
    return copied, failed


def keep_copies(state: State, archives: Mapping[ModelVersion, Archive]) -> None:
    """Delete all copies but these."""
    kept = {archive.path for archive in archives.values()}
    for path in state.archives.glob("*"):
        if path not in kept:
            path.unlink(missing_ok=True)


def unregister(client: Client, model: str, version: str) -> None:
    """Take a version out of the server, which refuses that of a default version while there are others.

    Raises ServerError.
    """
    try:
        for info in client.models():
            others = [one.version for one in info.versions if one.version != version]
            if info.name == model and info.default.version == version and others:
                client.set_default(model, defaults.highest(others))
        client.unregister(model, version)
    except ModelNotFound:
        return
    except ServingError as error:
        raise ServerError(f"The server does not unregister {model}/{version}: {error}") from None


def _addresses(configured: dict[str, str], options: StartOptions) -> Addresses:
    where = properties.addresses(configured).with_ports(options.port, options.grpc_port)
    return where.with_free_ports() if options.free_ports else where
