"""The current traffic split of each model: `routes.yaml`, changed by rollouts and ejections."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torchserve_dag.archives import mar
from torchserve_dag.front_door.routes_file import RouteFile


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """A version of a model that TorchServe serves."""

    model: str
    version: str
    timeout_s: float
    """TorchServe's response timeout."""
    ours: bool
    """Whether this package built the archive: its workers understand the request id and the trace context."""
    streams: bool = False
    """Whether answers may be streamed in chunks."""
    language: tuple[str, ...] = ()
    """What OpenAI's API at `/v1` may ask of it: `chat`, `completion`, `embedding`, `moderation`."""

    @property
    def name(self) -> str:
        return f"{self.model}/{self.version}"

    @classmethod
    def of(cls, model: str, version: str, timeout_s: float, archive: Path) -> ServedVersion:
        """A version as its host and the archive that it serves it from describe it."""
        ours, streams = mar.is_ours(archive), mar.is_asynchronous(archive)
        return cls(model, version, float(timeout_s), ours, streams, mar.language(archive))


@dataclass(frozen=True, slots=True)
class RolloutShare:
    """The share of a version that is being rolled out."""

    version: str
    share: float
    """The new version's share of the requests, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Split:
    """How the requests for a model that name no version are split at present."""

    model: str
    weights: tuple[tuple[str, float], ...]
    """Version and weight, in a stable order: a sticky user changes version only if the weights at its position change.
    A version may occur several times. Empty if no version that may answer is served."""
    route: RouteFile
    """The route's other settings."""
    ejected: frozenset[str] = frozenset()
    """Versions that keep failing: their requests go to the fallback until the ejection ends."""

    @property
    def fallback(self) -> str | None:
        return self.route.fallback

    def falls_back(self, version: str) -> bool:
        """Whether the fallback answers if this version fails."""
        return self.fallback is not None and version != self.fallback

    @property
    def shares(self) -> dict[str, float]:
        """Version → share of the requests, from 0 to 1, ejections aside."""
        whole = sum(weight for _, weight in self.weights)
        found = dict.fromkeys((version for version, _ in self.weights), 0.0)
        for version, weight in self.weights:
            found[version] += weight / whole
        return found


def splits(
    served: Collection[ServedVersion],
    routes: Mapping[str, RouteFile],
    defaults: Mapping[str, str],
    rollouts: Mapping[str, RolloutShare],
    ejected: Collection[tuple[str, str]] = (),
) -> list[Split]:
    """The split of each served model: its route, or 100 % to its default version; with the shares of rollouts.

    The share of a version that is not served goes to the others. Only a version that was decided on gets a share.
    """
    result = []
    for model in sorted({one.model for one in served}):
        served_versions = {one.version for one in served if one.model == model}
        route = routes.get(model) or RouteFile({defaults.get(model, ""): 100})
        weights = tuple((version, weight) for version, weight in route.versions.items() if version in served_versions)
        if not sum(weight for _, weight in weights):
            weights = ()
        weights = carved(weights, rollouts[model]) if weights and model in rollouts else weights
        ejected_versions = frozenset(version for name, version in ejected if name == model)
        result.append(Split(model, weights, _only(route, served_versions), ejected_versions))
    return result


def carved(weights: tuple[tuple[str, float], ...], rolling: RolloutShare) -> tuple[tuple[str, float], ...]:
    """The weights, with the new version's share cut off the end of every other version's hash range.

    So sticky users outside the parts that are cut off keep their version.
    """
    whole = sum(weight for _, weight in weights)
    own = sum(weight for version, weight in weights if version == rolling.version) / whole
    cut = max(0.0, rolling.share - own) / (1 - own) if own < 1 else 0.0
    parts: list[tuple[str, float]] = []
    for version, weight in weights:
        if version == rolling.version:
            parts.append((version, weight))
        else:
            parts += [(version, weight * (1 - cut)), (rolling.version, weight * cut)]
    return tuple(parts)


def _only(route: RouteFile, served: Collection[str]) -> RouteFile:
    """The route without rules, shadows and fallback of versions that are not served, such as retired ones."""
    return replace(
        route,
        always={rule: version for rule, version in route.always.items() if version in served},
        shadow={version: percent for version, percent in route.shadow.items() if version in served},
        fallback=route.fallback if route.fallback in served else None,
    )
