"""The default version of a model, which answers requests that name no version."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torchserve_dag.archives.archive import copies
from torchserve_dag.clients import Client, ModelNotFound
from torchserve_dag.clients.models import version_key
from torchserve_dag.server import releases_file
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State

logger = logging.getLogger(__name__)

FIRST = "the highest version when the model was first served"
SHARED = "the version with the largest share in routes.yaml when the model was first served"


def apply(state: State, client: Client, shares: Mapping[str, Mapping[str, float]]) -> None:
    """Set each model's default: the version of `releases.yaml`, if it is served.

    For a model without one, this is the version with the largest share, or else the highest; it is written there.
    TorchServe itself makes the archive that it happens to read first the default. Raises CheckError, ServerError.
    """
    releases, contents = releases_file.read(state.root), copies(state.archives)
    for model in client.models():
        served = {version.version for version in model.versions}
        release = releases.get(model.name)
        best = release.default.version if release and release.default else None
        if best is None:
            weights = {version: weight for version, weight in shares.get(model.name, {}).items() if version in served}
            best = max(weights or served, key=lambda one: (weights.get(one, 0.0), version_key(one)))
            content = contents.get((model.name, best))
            why = SHARED if weights else FIRST
            record(state, model.name, best, content.hash if content else "", why)
        if best in served and best != model.default.version:
            client.set_default(model.name, best)


def record(state: State, name: str, version: str, content: str, why: str) -> None:
    """Write a model's first default. Where the project's folder cannot be written, the next start chooses again."""
    try:
        releases_file.decide(state, "default", name, version, content, why)
    except OSError as error:
        logger.warning("%s cannot be written (%s): the default of %s is not kept", releases_file.FILE, error, name)


def set_default(state: State, client: Client, name: str, version: str, reason: str) -> None:
    """Set the default version, now and at every later start. Raises ServerError if the version is not served."""
    try:
        client.set_default(name, version)
    except ModelNotFound:
        known = [f"{m.name}/{v.version}" for m in client.models() for v in m.versions]
        raise ServerError(
            f"{name}/{version} is not served (torchserve-dag serve {name}/{version}); these are: {', '.join(known)}."
        ) from None
    content = copies(state.archives).get((name, version))
    releases_file.decide(state, "default", name, version, content.hash if content else "", reason)


def highest(versions: Iterable[str]) -> str:
    """The highest version: 1.10 comes after 1.9."""
    return max(versions, key=version_key)
