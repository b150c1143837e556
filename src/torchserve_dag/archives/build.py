"""Check the chosen handlers and workflows, or build their archives; report which are built, left out or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torchserve_dag.archives import cards, mar, war
from torchserve_dag.archives.archive import ModelVersion
from torchserve_dag.archives.contents import Contents, contents
from torchserve_dag.archives.store import Built, Target, place, refuse_other_input
from torchserve_dag.archives.weights import MissingWeightsError
from torchserve_dag.runtime.data import plain, source
from torchserve_dag.runtime.data.source import CheckError, Problem, Source
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.graph.torchserve.spec import is_torchserve_file
from torchserve_dag.runtime.messages import WrongFieldError
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.project.handler_file import check_identity

FOLDERS = ("handlers", "workflows")
WORKFLOW_STORE = "workflow_store"
"""The folder beside the store for `.war` exports."""

BuildCallback = Callable[[str, int, int], None]
"""Called with the archive that is being built, how many are done, and how many there are."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    name: str
    version: str
    reasons: list[Problem]


@dataclass(frozen=True, slots=True)
class Report:
    built: list[Built] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    """Their weights are not on this machine, and they were not named."""
    not_exported: list[LeftOut] = field(default_factory=list)
    """Workflows that TorchServe's own engine cannot run: they have no `.war`."""
    updated: list[cards.Updated] = field(default_factory=list)
    """Cards whose hash was written."""
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Checked:
    """What `build` would build."""

    target: Target
    graph: Graph


def build(
    project: Project,
    names: Sequence[str] = (),
    *,
    store: Path | None = None,
    force: bool = False,
    update_cards: bool = False,
    fixed: Mapping[ModelVersion, str] | None = None,
    progress: BuildCallback | None = None,
) -> Report:
    """Build the named handlers and workflows, or all of them, into `store` (the project's `model_store`).

    A name is NAME, for all of its versions, or NAME/VERSION. A version that is built already stays as it is, also
    where this package or the environment has changed since. It is refused where the project's files differ, unless
    `force`. Not even `force` replaces one that is `fixed`: why, as the end of a sentence.
    `update_cards` first writes the sha256 of the weights that are here into the cards of the handlers.
    """
    store = store or project.root / "model_store"
    report = Report()
    wanted = targets(project, names, report.problems)
    for i, target in enumerate(wanted):
        if progress:
            progress(str(target), i, len(wanted))
        with _reported(report, target, named=bool(names)):
            graph = read_graph(project, target.file.path)
            if update_cards and (updated := cards.update(project, graph.handlers.values())):
                report.updated.extend(updated)
                graph = read_graph(project, target.file.path)
            content = contents(project, graph)
            why_fixed = (fixed or {}).get((target.name, target.version))
            report.built.append(_build_one(target, content, store, force=force, fixed=why_fixed))
            if _is_exported(target):
                report.built.extend(war.export(project, target, graph, content, _exports(store), force=force))
    return report


def check(project: Project, names: Sequence[str] = (), *, store: Path | None = None) -> tuple[list[Checked], Report]:
    """What `build` would refuse: every step of it that can fail, with nothing written.

    Returns what has no problems, and a report in which nothing is built.
    """
    store = store or project.root / "model_store"
    report, good = Report(), []
    for target in targets(project, names, report.problems):
        before = len(report.problems)
        graph = None
        with _reported(report, target, named=bool(names)):
            graph = read_graph(project, target.file.path)
            content = contents(project, graph)
            refuse_other_input(target, store / str(target), content.origin())
            if _is_exported(target):
                war.refuse_other_input(target, graph, content, _exports(store))
        if graph and len(report.problems) == before:
            good.append(Checked(target, graph))
    return good, report


@contextmanager
def _reported(report: Report, target: Target, *, named: bool) -> Iterator[None]:
    """A block whose refusals go into the report, each once."""
    problems: list[Problem] = []
    try:
        yield
    except war.NotForTorchServeError as error:
        report.not_exported.append(LeftOut(target.name, target.version, error.problems))
    except MissingWeightsError as error:
        if named:
            problems = error.problems
        else:
            report.left_out.append(LeftOut(target.name, target.version, error.problems))
    except CheckError as error:
        problems = error.problems
    report.problems.extend(problem for problem in problems if problem not in report.problems)


def _is_exported(target: Target) -> bool:
    """Whether there is a `.war` of it, too."""
    return target.folder == "workflows" and not is_torchserve_file(target.file.path)


def _exports(store: Path) -> Path:
    return store.with_name(WORKFLOW_STORE)


def targets(project: Project, names: Sequence[str], problems: list[Problem]) -> list[Target]:
    """The targets that `names` mean, or all targets; mistakes in their files and in the names go to `problems`."""
    stems = {name.partition("/")[0] for name in names}
    by_version: dict[tuple[str, str], Target] = {}
    for folder in FOLDERS:
        for path in project.files(folder):
            try:
                target = _target(folder, path)
            except CheckError as error:
                if not names or path.stem in stems:
                    problems.extend(error.problems)
                continue
            first = by_version.setdefault((target.name, target.version), target)
            if first is not target and (not names or target.name in stems):
                what = f"{target.name} {target.version} is {first.file.path} already"
                problems.append(target.file.problem(("version",), what, "give it a name or a version of its own"))
    if not names:
        return list(by_version.values())
    chosen: dict[int, Target] = {}
    for name in names:
        matches = [t for t in by_version.values() if name in {t.name, f"{t.name}/{t.version}"}]
        chosen |= {id(target): target for target in matches}
        if not matches and not any(Path(problem.file).stem == name.partition("/")[0] for problem in problems):
            known = sorted(
                {t.name for t in by_version.values()} | {f"{t.name}/{t.version}" for t in by_version.values()}
            )
            what = f'there is no handler or workflow "{name}"'
            problems.append(Problem(str(project.root / "handlers"), 1, what, plain.did_you_mean(name, known)))
    return list(chosen.values())


def _build_one(target: Target, content: Contents, store: Path, *, force: bool, fixed: str | None) -> Built:
    def write(part: Path) -> None:
        mar.write(part, target.name, target.version, content.small, content.large)

    return place(target, store / str(target), write, origin=content.origin(), force=force, fixed=fixed)


def _target(folder: str, path: Path) -> Target:
    data, lines = source.read_plain(path) if path.suffix == ".yaml" else ({}, {})
    file = Source(path, data, lines)
    name, version = (data.get(key) if isinstance(data, dict) else None for key in ("name", "version"))
    # The file is read in full, and every mistake in it named, when its turn comes. TorchServe's own workflows
    # have neither a name nor a version in them.
    target = Target(
        folder, file, name if isinstance(name, str) else path.stem, version if isinstance(version, str) else "1.0"
    )
    try:
        check_identity(target.name, target.version)  # they become a file's name
    except WrongFieldError as error:
        raise CheckError([file.problem(error.path, str(error))]) from None
    return target
