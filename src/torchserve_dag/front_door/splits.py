"""Which version of each model answers whom: what `routes.yaml` says, with what a rollout or a failure makes of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torchserve_dag.front_door.routes_file import RouteFile


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """One version of a model that TorchServe has."""

    model: str
    version: str
    timeout_s: float
    """How long TorchServe waits for its answer."""
    ours: bool
    """Built by this package: it knows the request's id and trace."""
    streams: bool = False
    """Its answers may come in pieces."""

    @property
    def name(self) -> str:
        return f"{self.model}/{self.version}"


@dataclass(frozen=True, slots=True)
class RolloutShare:
    """A version that is being rolled out."""

    version: str
    share: float
    """Of all requests, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Split:
    """How the requests for a model that name no version are shared, now."""

    model: str
    weights: tuple[tuple[str, float], ...]
    """In an order that stays: a sticky user's version changes only where its share does. A version may come again."""
    route: RouteFile
    """The rest of it."""
    ejected: frozenset[str] = frozenset()
    """Versions that keep failing: their part goes to the fallback until they are tried again."""

    @property
    def fallback(self) -> str | None:
        return self.route.fallback

    def falls_back(self, version: str) -> bool:
        """Whether another version is asked where this one fails."""
        return self.fallback is not None and version != self.fallback

    @property
    def shares(self) -> dict[str, float]:
        """The part of the requests, of 1, that each version is meant for."""
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
    """Of each model that is served: its route of the file, or all to its default; less what a rollout takes."""
    found = []
    for model in sorted({one.model for one in served}):
        route = routes.get(model) or RouteFile({defaults[model]: 100})
        weights = tuple(route.versions.items())
        weights = carved(weights, rollouts[model]) if model in rollouts else weights
        here = {one.version for one in served if one.model == model}
        out = frozenset(version for name, version in ejected if name == model)
        found.append(Split(model, weights, _only(route, here), out))
    return found


def carved(weights: tuple[tuple[str, float], ...], rolling: RolloutShare) -> tuple[tuple[str, float], ...]:
    """The new version's share, cut off the end of each other version's: nobody else changes places."""
    whole = sum(weight for _, weight in weights)
    own = sum(weight for version, weight in weights if version == rolling.version) / whole
    cut = max(0.0, rolling.share - own) / (1 - own) if own < 1 else 0.0
    found: list[tuple[str, float]] = []
    for version, weight in weights:
        if version == rolling.version:
            found.append((version, weight))
        else:
            found += [(version, weight * (1 - cut)), (rolling.version, weight * cut)]
    return tuple(found)


def _only(route: RouteFile, here: Collection[str]) -> RouteFile:
    """Without what is not there: a rule or a shadow of a version that was retired."""
    return replace(
        route,
        always={rule: version for rule, version in route.always.items() if version in here},
        shadow={version: percent for version, percent in route.shadow.items() if version in here},
        fallback=route.fallback if route.fallback in here else None,
    )
