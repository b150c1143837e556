"""Which version of a model answers where a call names none."""

from __future__ import annotations

from collections.abc import Iterable

from torchserve_dag.clients import Client, ModelNotFound
from torchserve_dag.clients.models import version_key
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State


def apply(state: State, client: Client) -> None:
    """For each model the version that somebody set, as long as it is there; else the highest.

    TorchServe by itself takes the archive that it happens to read first.
    """
    chosen = state.defaults()
    for model in client.models():
        versions = {version.version for version in model.versions}
        wanted = chosen.get(model.name)
        best = wanted if wanted in versions else highest(versions)
        if best != model.default.version:
            client.set_default(model.name, best)


def set_default(state: State, client: Client, name: str, version: str) -> None:
    """Set it now, and at each start from now on. Raises ServerError where there is no such version."""
    try:
        client.set_default(name, version)
    except ModelNotFound:
        known = [f"{m.name}/{v.version}" for m in client.models() for v in m.versions]
        raise ServerError(f"{name}/{version} is not served; these are: {', '.join(known)}.") from None
    state.save_default(name, version)


def highest(versions: Iterable[str]) -> str:
    """The last of some versions by their numbers: 1.10 comes after 1.9."""
    return max(versions, key=version_key)
