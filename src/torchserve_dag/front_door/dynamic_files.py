"""The files that Envoy reads again whenever they change: all of its configuration that changes while it runs."""

from __future__ import annotations

from pathlib import Path

from torchserve_dag.front_door.backend import Resource

ROUTES, CLUSTERS, CERTIFICATE = "routes.json", "clusters.json", "certificate.json"
ACCEPTED = "accepted_tokens.json"
"""Apart from the routes, so that a revocation waits for nothing else."""
SAMPLING = "sampling.json"


def from_file(path: Path) -> Resource:
    return {
        "resource_api_version": "V3",
        "path_config_source": {"path": str(path), "watched_directory": {"path": str(path.parent)}},
    }
