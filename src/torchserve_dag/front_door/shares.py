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
class Split:
    """How the requests for a model that name no version are shared, now."""

    model: str
    weights: tuple[tuple[str, float], ...]
    """In an order that stays: a sticky user's version changes only where its share does."""
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

    def answers(self, version: str) -> str:
        """Who is asked first where a version is meant."""
        return self.fallback if self.fallback and version in self.ejected else version


def splits(
    served: Collection[ServedVersion],
    routes: Mapping[str, RouteFile],
    defaults: Mapping[str, str],
    rollouts: Mapping[str, Mapping[str, float]],
    ejected: Collection[tuple[str, str]] = (),
) -> list[Split]:
    """For each model that is served: its route of the file, or all to its default version; a rollout's weights win."""
    found = []
    for model in sorted({one.model for one in served}):
        route = routes.get(model) or RouteFile({defaults[model]: 100})
        weights = {**dict.fromkeys(route.versions, 0.0), **rollouts[model]} if model in rollouts else route.versions
        here = {one.version for one in served if one.model == model}
        out = frozenset(version for name, version in ejected if name == model)
        found.append(Split(model, tuple(weights.items()), _only(route, here), out))
    return found


def _only(route: RouteFile, here: Collection[str]) -> RouteFile:
    """Without what is not there: a rule or a shadow of a version that was retired."""
    return replace(
        route,
        always={rule: version for rule, version in route.always.items() if version in here},
        shadow={version: percent for version, percent in route.shadow.items() if version in here},
        fallback=route.fallback if route.fallback in here else None,
    )
