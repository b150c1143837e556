"""The graph of an archive that `build` made, read from the archive itself."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torchserve_dag.archives import mar
from torchserve_dag.archives.archive import Archive, UnusableArchiveError
from torchserve_dag.archives.store import part_of_archive
from torchserve_dag.runtime.data import unzip
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.project.folders import Project


def graph_of(archive: Archive) -> Graph:
    """The graph that is served, whatever the project's files say by now. Raises UnusableArchiveError, CheckError."""
    if not mar.is_ours(archive.path):
        raise UnusableArchiveError("was not built by torchserve-dag, and has no graph")
    served = mar.read_json(archive.path, mar.BUILD)["file"]
    with tempfile.TemporaryDirectory(prefix="torchserve-dag-") as folder:
        project = [entry for entry in mar.checksums(archive.path) if part_of_archive(entry) == "project"]
        unzip.extract(archive.path, Path(folder), project)
        return read_graph(Project(Path(folder)), Path(folder) / served)
