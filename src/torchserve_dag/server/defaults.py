"""The default version of a model, which answers requests that name no version."""

from __future__ import annotations

from collections.abc import Iterable

from torchserve_dag.clients import Client, ModelNotFound
from torchserve_dag.clients.models import version_key
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State


def apply(state: State, client: Client) -> None:
    """Set each model's default: the version that was chosen with `default`, if it is served, or else the highest.

    TorchServe itself makes the archive that it happens to read first the default.
    """
    chosen = state.defaults()
    for model in client.models():
        versions = {version.version for version in model.versions}
        wanted = chosen.get(model.name)
        best = wanted if wanted in versions else highest(versions)
        if best != model.default.version:
            client.set_default(model.name, best)


def set_default(state: State, client: Client, name: str, version: str) -> None:
    """Set the default version, now and at every later start. Raises ServerError if the version is not served."""
    try:
        client.set_default(name, version)
    except ModelNotFound:
        known = [f"{m.name}/{v.version}" for m in client.models() for v in m.versions]
        raise ServerError(f"{name}/{version} is not served; these are: {', '.join(known)}.") from None
    state.save_default(name, version)


def highest(versions: Iterable[str]) -> str:
    """The highest version by its numbers: 1.10 comes after 1.9."""
    return max(versions, key=version_key)
