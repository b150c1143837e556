"""A version to evaluate: its archive in the model store, loaded in this process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torchserve_dag.archives import mar
from torchserve_dag.archives.archive import Archive, read_store
from torchserve_dag.archives.store import part_of_archive
from torchserve_dag.clients.models import version_key
from torchserve_dag.runtime.data import plain, unzip
from torchserve_dag.runtime.graph.torchserve.nodes import takes_rows
from torchserve_dag.runtime.worker.service import read_archive
from torchserve_dag.runtime.workflow import Workflow
from torchserve_dag.server import properties
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State

ITEM_S = 600
"""How long an item may take at least. The limits of a workflow are for clients; here items wait for each other, on a
machine that may be busy, and how long they take is not what is measured."""


def model_store(root: Path) -> Path:
    """The project's folder of archives."""
    return root / properties.read(properties.find(root)).get("model_store", "model_store")


def find_version(store: Path, reference: str) -> Archive:
    """The archive that `NAME/VERSION` names, or `NAME`: its highest version. Raises ServerError."""
    name, _, version = reference.partition("/")
    archives = read_store(store).archives
    versions = sorted((one for model, one in archives if model == name), key=version_key)
    if not versions:
        hint = plain.did_you_mean(name, sorted({model for model, _ in archives}))
        raise ServerError(f"{name} is not in {store}{hint and f' ({hint})'}: torchserve-dag build {name}.")
    found = archives.get((name, version or versions[-1]))
    if not found:
        known = ", ".join(versions)
        raise ServerError(f"{reference} is not in {store} (only {known}): torchserve-dag build {reference}.")
    if len(found) > 1:
        files = " and ".join(one.path.name for one in found)
        raise ServerError(f"{files} in {store} are {name}/{found[0].version}, and differ: delete all but one.")
    return found[0]


@contextmanager
def loaded(root: Path, archive: Archive, device: str | None = None) -> Iterator[Workflow]:
    """The workflow in an archive: its code and its weights, by the installed version of this package.

    Raises ServerError for an archive that `build` did not make, CheckError, and whatever a handler's `load` raises.
    """
    which = f"{archive.name}/{archive.version}"
    if not mar.is_ours(archive.path):
        raise ServerError(f"{archive.path} was not built by torchserve-dag, which can evaluate its own archives only.")
    state = State(root)
    state.make()
    with tempfile.TemporaryDirectory(prefix="evaluate-", dir=state.folder) as folder:  # as large as its weights
        unzip.extract(archive.path, Path(folder))
        project, graph, _ = read_archive(Path(folder))
        if takes_rows(graph):
            raise ServerError(f"{which} is in TorchServe's form, whose inputs have no type: it cannot be evaluated.")
        patient = replace(graph, serve=replace(graph.serve, timeout_s=max(ITEM_S, graph.serve.timeout_s)))
        with Workflow(project, patient, device=device) as workflow:
            yield workflow


def edited(root: Path, archive: Archive) -> list[str]:
    """The files of the project that differ from those in an archive: what is evaluated is not what they say."""
    packed = {path: entry for path, entry in mar.checksums(archive.path).items() if part_of_archive(path) == "project"}
    there = {path: root / path for path in packed if (root / path).is_file()}
    return [path for path, file in there.items() if mar.checksum(file) != packed[path]]
