"""Whether a host of this version of the package can run an archive: the two have to speak one protocol.

A host calls `why_not_hosted` before it loads anything of an archive. TorchServe needs no answer: an archive brings the
loop for TorchServe's workers with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchserve_dag.archives import mar
from torchserve_dag.runtime.worker.protocol import PROTOCOL


def why_not_hosted(archive: Path) -> str | None:
    """Why a host cannot run an archive, and what to do, in a sentence; None where it can, or it is not ours."""
    try:
        build = mar.read_json(archive, mar.BUILD)
    except KeyError:  # somebody else's, which has no part of this package
        return None
    except (OSError, ValueError, mar.BadArchiveError) as error:
        return f"{archive.name} cannot be read ({error}): build it again."
    return why_not_spoken(build)


def why_not_spoken(build: Mapping[str, Any]) -> str | None:
    """As `why_not_hosted`, of what an archive's `build.json` says."""
    spoken = build.get("protocol")
    if spoken == PROTOCOL:
        return None
    archive = f"{build.get('name')} {build.get('version')}"
    speaks = "no protocol (it was built before there were protocols)" if spoken is None else f"protocol {spoken}"
    return (
        f"{archive} speaks {speaks}, and a host of this torchserve-dag needs protocol {PROTOCOL}: "
        "build it again under a new version, or let TorchServe serve it as it is."
    )
