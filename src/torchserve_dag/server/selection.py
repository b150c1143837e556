"""Which archives of the store a server loads, and what is to be said about the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from torchserve_dag.archives.archive import Archive, ModelVersion, Store
from torchserve_dag.clients.models import version_key
from torchserve_dag.server.releases_file import FILE, Decision, Kind, ModelReleases, Releases, decided

RemarkKind = Literal["failed", "differs", "rejected", "new", "left out", "limited"]


@dataclass(frozen=True, slots=True)
class Remark:
    """What a person should know about an archive, or about the start, in one line."""

    kind: RemarkKind
    """`failed`: it should be served, and is not. `differs`: its content is not what was decided on, or is served.
    `rejected`: it is served, and was rolled back. `new`: nobody decided on it. `left out`: nothing asks for it.
    `limited`: this machine gives the front door less than its settings say."""
    what: str
    """A model and its version, or a file."""
    why: str

    @property
    def fault(self) -> bool:
        return self.kind in {"failed", "differs"}

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


@dataclass(frozen=True, slots=True)
class Selection:
    """What a server is to load."""

    archives: dict[ModelVersion, Archive]
    remarks: tuple[Remark, ...]


def select(
    store: Store, releases: Releases, named: Collection[ModelVersion], copies: Mapping[ModelVersion, Archive]
) -> Selection:
    """Choose the versions that `routes.yaml` (`named`) and `releases.yaml` name, and the newest of the rest.

    Of a version whose archive in the store is not the one that was decided on, the server's own copy is chosen if it
    is: `copies`.
    """
    archives: dict[ModelVersion, Archive] = {}
    remarks = [Remark("failed", file, f"it {why}") for file, why in store.unusable.items()]
    decisions = decided(releases)
    for model in sorted({name for name, _ in store.archives}):
        release = releases.get(model, ModelReleases())
        versions = sorted((version for name, version in store.archives if name == model), key=version_key)
        wanted = {version for name, version in named if name == model} | release.served.keys()
        if release.default:
            wanted.add(release.default.version)
        rest = [one for one in versions if one not in {*wanted, *release.retired, *release.rejected}]
        if not release.default and not wanted.intersection(versions):
            wanted.update(rest[-1:])  # the first `up` makes it the default
            rest = rest[:-1]
        newest = rest[-1] if rest else None
        for version in versions:
            key = (model, version)
            if version not in wanted and version != newest:
                remarks.append(_left_out(model, version, *decisions.get(key, (None, Decision()))))
                continue
            chosen = _choose(store.archives[key], decisions.get(key), copies.get(key))
            if isinstance(chosen, Archive):
                archives[key] = chosen
                if (
                    version == newest
                    and release.default
                    and version_key(version) > version_key(release.default.version)
                ):
                    remarks.append(_new(model, version, served=True))
            else:
                remarks.append(Remark("failed", f"{model} {version}", chosen))
        missing = sorted(wanted.difference(versions), key=version_key)
        remarks += [_missing(model, version, decisions.get((model, version))) for version in missing]
    for model in releases.keys() - {name for name, _ in store.archives}:
        default = releases[model].default
        if default:
            remarks.append(_missing(model, default.version, decisions.get((model, default.version))))
    return Selection(archives, tuple(remarks))


def differences(store: Store, releases: Releases, served: Mapping[ModelVersion, Archive] | None = None) -> list[Remark]:
    """Versions whose content in the store, in `releases.yaml` and on the server is not one and the same."""
    decisions, remarks = decided(releases), []
    for key in sorted({*decisions, *(served or {})}):
        what = f"{key[0]} {key[1]}"
        in_store = " and ".join(one.hash for one in store.archives.get(key, ()))
        wanted = decisions[key][1].hash if key in decisions else ""
        on_server = served[key].hash if served and key in served else ""
        if on_server and in_store and on_server not in in_store:
            why = f"{on_server} is served, and {in_store} is in the store: a version never changes, build a new one"
            remarks.append(Remark("differs", what, why))
        elif wanted and in_store and wanted not in in_store:
            accept = f"build a new version, or delete its hash in {FILE} to accept this one at the next start"
            why = f"{FILE} decided on {wanted}, and {in_store} is in the store: {accept}"
            remarks.append(Remark("differs", what, why))
        elif wanted and on_server and wanted != on_server:
            remarks.append(Remark("differs", what, f"{FILE} decided on {wanted}, and {on_server} is served"))
    return remarks


def standing(store: Store, releases: Releases, served: Mapping[ModelVersion, Archive | None]) -> list[Remark]:
    """What is to be said of a running server: what differs, what it lacks, what was rolled back, what is new."""
    remarks = differences(store, releases, {key: archive for key, archive in served.items() if archive})
    for key, (kind, decision) in decided(releases).items():
        what = f"{key[0]} {key[1]}"
        if kind == "default" and key not in served:
            how = f"torchserve-dag serve {key[0]}/{key[1]} loads it, default {key[0]} VERSION chooses another"
            remarks.append(Remark("failed", what, f"it is the default in {FILE}, and is not served: {how}"))
        elif kind == "rejected" and key in served:
            again = f"torchserve-dag retire {key[0]}/{key[1]} unloads it, and later starts leave it out"
            remarks.append(Remark("rejected", what, f"{_when_and_why(decision)}; {again}"))
        elif kind in {"rejected", "retired"} and key in store.archives and key not in served:
            remarks.append(_left_out(*key, kind, decision))
    models = {name for name, _ in served}
    for model, version in sorted(store.archives.keys() - decided(releases).keys(), key=_in_order):
        default = releases.get(model, ModelReleases()).default
        if version_key(version) > version_key(default.version) if default else model not in models:
            remarks.append(_new(model, version, served=(model, version) in served))
    return remarks


def _in_order(key: ModelVersion) -> tuple[object, ...]:
    return key[0], version_key(key[1])


def _new(model: str, version: str, *, served: bool) -> Remark:
    """Of a version that requests may name already, or of one that lies in the store only."""
    other = f"default {model} {version}" if served else f"serve {model}/{version} for requests that name it"
    how = f"torchserve-dag rollout {model} {version}, or {other}"
    return Remark("new", f"{model} {version}", f"nobody decided on it: {how}")


def _choose(
    in_store: tuple[Archive, ...], decision: tuple[Kind, Decision] | None, copy: Archive | None
) -> Archive | str:
    """The archive of a version, or why there is none."""
    wanted = decision[1].hash if decision else ""
    for archive in (*in_store, *([copy] if copy else [])):
        if wanted and archive.hash == wanted:
            return archive
    if len(in_store) > 1:
        files = " and ".join(one.path.name for one in in_store)
        return f"{files} are of this version, and differ: delete all but one"
    return in_store[0]


def _left_out(model: str, version: str, kind: Kind | None, decision: Decision) -> Remark:
    what, again = f"{model} {version}", f"torchserve-dag serve {model}/{version} loads it"
    if kind is None:
        return Remark("left out", what, f"an older version: {again}")
    return Remark("left out", what, f"{kind} {_when_and_why(decision)}; {again}")


def _when_and_why(decision: Decision) -> str:
    day = f"on {decision.date.partition(' ')[0]}" if decision.date else "on an unknown day"
    return f"{day}: {decision.reason.rstrip('.')}" if decision.reason else day


def _missing(model: str, version: str, decision: tuple[Kind, Decision] | None) -> Remark:
    said = {"default": "the default", "served": "served"}.get(decision[0], "") if decision else ""
    by = f"it is {said} in {FILE}" if said else "routes.yaml names it"
    return Remark(
        "failed", f"{model} {version}", f"{by}, and the store has no archive of it: build it or copy it there"
    )
