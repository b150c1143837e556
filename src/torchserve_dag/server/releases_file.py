"""`releases.yaml`: which versions people and rollouts decided on, and why. Commands write it, people commit it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import yaml

from torchserve_dag.archives import atomic
from torchserve_dag.archives.archive import ModelVersion
from torchserve_dag.clients.models import version_key
from torchserve_dag.runtime.data import plain, source
from torchserve_dag.runtime.data.source import Source
from torchserve_dag.server.state import State, locked

FILE = "releases.yaml"
HEAD = """\
# Which versions were decided on. Written by torchserve-dag: the first `up`, default, serve, rollout, promote, rollback,
# retire. Commit it. An edit by hand is kept, a comment is not. docs/releasing.md
"""
LOCK_S = 30.0
"""Seconds to wait for the file's lock; a change takes milliseconds."""

LONGEST_REASON = 500

Kind = Literal["default", "served", "retired", "rejected"]


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision about a version."""

    hash: str = ""
    """The hash of the archive's content that was decided on, as `status` shows it."""
    date: str = ""
    """When, in UTC."""
    reason: str = ""
    """Why, in a sentence."""


@dataclass(frozen=True, slots=True)
class DefaultVersion:
    """The version that answers requests that name none."""

    version: str
    """Its name."""
    hash: str = ""
    """The hash of the archive's content that was decided on."""
    date: str = ""
    """When, in UTC."""
    reason: str = ""
    """Why, in a sentence."""


@dataclass(frozen=True, slots=True)
class ModelReleases:
    """The decisions about one model."""

    default: DefaultVersion | None = None
    """The version that answers requests that name none, where `routes.yaml` does not share them."""
    served: dict[str, Decision] = field(default_factory=dict)
    """Other versions that `serve` brought in: every start loads them."""
    retired: dict[str, Decision] = field(default_factory=dict)
    """Versions that `retire` took out: no start loads them."""
    rejected: dict[str, Decision] = field(default_factory=dict)
    """Versions that a rollout rolled back from: no start loads them."""

    def decisions(self) -> Iterator[tuple[str, Kind, Decision]]:
        """Each version that was decided on, how, and the decision."""
        if one := self.default:
            yield one.version, "default", Decision(one.hash, one.date, one.reason)
        kinds: tuple[tuple[Kind, dict[str, Decision]], ...] = (
            ("served", self.served),
            ("retired", self.retired),
            ("rejected", self.rejected),
        )
        for kind, by_version in kinds:
            for version, decision in by_version.items():
                yield version, kind, decision


Releases = dict[str, ModelReleases]


def read(root: Path) -> Releases:
    """The project's decisions; none without a `releases.yaml`. Raises CheckError."""
    file = read_source(root)
    return file.value if file else {}


def read_source(root: Path) -> Source[Releases] | None:
    """As `read`, with the line of each decision."""
    path = root / FILE
    return source.read(path, Releases) if path.is_file() else None


def decided(releases: Releases) -> dict[ModelVersion, tuple[Kind, Decision]]:
    """Every version that was decided on."""
    return {(name, version): (kind, one) for name, of in releases.items() for version, kind, one in of.decisions()}


def decide(state: State, kind: Kind, name: str, version: str, content: str, reason: str) -> None:
    """Write a decision, with the hash of the archive's content, in place of earlier ones about this version.

    Raises CheckError for a file with a mistake, ServerError, OSError.
    """
    one = Decision(content, datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S"), _one_line(reason))

    def edit(releases: Releases) -> Releases:
        of = releases.get(name, ModelReleases())
        default = of.default if of.default and of.default.version != version else None
        if kind == "default":
            default = DefaultVersion(version, one.hash, one.date, one.reason)
        served, retired, rejected = (
            {v: decision for v, decision in before.items() if v != version} | ({version: one} if kind == now else {})
            for now, before in (("served", of.served), ("retired", of.retired), ("rejected", of.rejected))
        )
        return {**releases, name: ModelReleases(default, served, retired, rejected)}

    change(state, edit)


def forgive(state: State, name: str, versions: Collection[str]) -> None:
    """Drop what was retired or rejected, because a newer decision names it. Raises CheckError, ServerError, OSError."""

    def edit(releases: Releases) -> Releases:
        if name not in releases:
            return releases
        before = releases[name]
        retired = {version: one for version, one in before.retired.items() if version not in versions}
        rejected = {version: one for version, one in before.rejected.items() if version not in versions}
        return {**releases, name: replace(before, retired=retired, rejected=rejected)}

    change(state, edit)


def change(state: State, edit: Callable[[Releases], Releases]) -> None:
    """Change the file, whole or not at all. Raises CheckError, ServerError, OSError."""
    state.make()
    with locked(state.folder / "releases.lock", LOCK_S, f"Another command is writing {FILE}: try again."):
        before = read(state.root)
        after = edit(before)
        if after != before:
            atomic.write_text(state.root / FILE, written(after))


def _one_line(text: str) -> str:
    """A text, such as a worker's error, as a line that a file may have."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:LONGEST_REASON]


def written(releases: Releases) -> str:
    """The file's text: models in their order, without what is empty."""
    data = {}
    for name, of in releases.items():
        flat = plain.flatten(of)
        for kind in ("served", "retired", "rejected"):
            flat[kind] = {version: flat[kind][version] for version in sorted(flat[kind], key=version_key)}
        if kept := {key: value for key, value in flat.items() if value}:
            data[name] = kept
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None, width=1000)
    return HEAD + text
