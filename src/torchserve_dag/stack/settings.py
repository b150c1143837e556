"""The files at the project's root that say how it is served, read and checked together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.archives.archive import ModelVersion, Store, copies
from torchserve_dag.clients.models import version_key
from torchserve_dag.front_door import routes_file
from torchserve_dag.front_door import settings as front_door_file
from torchserve_dag.front_door.routes_file import RouteFile
from torchserve_dag.front_door.settings import FrontDoor
from torchserve_dag.runtime.data import source
from torchserve_dag.runtime.data.source import CheckError, Problem
from torchserve_dag.server import releases_file
from torchserve_dag.server.connect import is_running
from torchserve_dag.server.releases_file import decided
from torchserve_dag.server.selection import differences
from torchserve_dag.server.state import Host, State

FILE = "torchserve-dag.yaml"


@dataclass(frozen=True, slots=True)
class ProjectSettings:
    """Settings of the project as a whole."""

    host: Host = "torchserve"
    """What the models' workers belong to: `torchserve`, or `direct`, with no server between them and Envoy."""
    vllm_metrics: bool = False
    """Have the metrics of every language model under vLLM's names, too, on the direct host's page."""


@dataclass(frozen=True, slots=True)
class ServingSettings:
    """`torchserve-dag.yaml`, `front_door.yaml` and `routes.yaml`; each is optional."""

    project: ProjectSettings
    front_door: FrontDoor
    routes: dict[str, RouteFile]


def read(root: Path, known: Iterable[ModelVersion]) -> ServingSettings:
    """The settings of a project with these `known` models and versions. Raises CheckError with all files' problems."""
    problems = overlooked(root)
    project, front_door, routes = ProjectSettings(), FrontDoor(), dict[str, RouteFile]()
    try:
        project = _project(root)
    except CheckError as error:
        problems += error.problems
    try:
        front_door = front_door_file.read(root)
    except CheckError as error:
        problems += error.problems
    try:
        routes = _routes(root, known)
    except CheckError as error:
        problems += error.problems
    if problems:
        raise CheckError(problems)
    return ServingSettings(project, front_door, routes)


def overlooked(root: Path) -> list[Problem]:
    """Files at the project's root that look like settings, and are not read."""
    stems = {Path(name).stem for name in (FILE, front_door_file.FILE, routes_file.FILE, releases_file.FILE)}
    found = [path for path in sorted(root.iterdir()) if path.suffix == ".yml" and path.stem in stems]
    return [Problem(str(path), 1, "a file that ends in .yml is not read", "let it end in .yaml") for path in found]


def releases_problems(root: Path, store: Store) -> list[Problem]:
    """Mistakes in `releases.yaml`, and versions whose archive in the store is not the one that was decided on."""
    try:
        file = releases_file.read_source(root)
    except CheckError as error:
        return error.problems
    if file is None:
        return []
    kinds = {f"{name} {version}": (name, kind, version) for (name, version), (kind, _) in decided(file.value).items()}
    remarks = differences(store, file.value)
    return [file.problem(kinds[remark.what], str(remark)) for remark in remarks]


def fixed(root: Path) -> dict[ModelVersion, str]:
    """The versions that nothing may replace, each with the reason, as the end of a sentence. Raises CheckError."""
    reasons: dict[ModelVersion, str] = {}
    file = routes_file.read(root)
    for name, route in (file.value if file else {}).items():
        reasons |= {(name, version): f"is named in {routes_file.FILE}" for version in route.named}
    for key, (kind, _) in decided(releases_file.read(root)).items():
        reasons[key] = f"is {'the default' if kind == 'default' else kind} in {releases_file.FILE}"
    state = State(root)
    if is_running(state):
        reasons |= dict.fromkeys(copies(state.archives), "is served now")
    return reasons


def _project(root: Path) -> ProjectSettings:
    path = root / FILE
    return source.read(path, ProjectSettings).value if path.is_file() else ProjectSettings()


def _routes(root: Path, known: Iterable[ModelVersion]) -> dict[str, RouteFile]:
    file = routes_file.read(root)
    if file is None:
        return {}
    versions: dict[str, list[str]] = {}
    for name, version in sorted(known, key=lambda model: (model[0], version_key(model[1]))):
        versions.setdefault(name, []).append(version)
    routes_file.check(file, versions)
    return file.value
