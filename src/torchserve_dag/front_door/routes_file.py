"""`routes.yaml`: which version of a model gets which requests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchserve_dag.runtime.data import plain, source
from torchserve_dag.runtime.data.source import CheckError, Problem, Source
from torchserve_dag.runtime.messages import WrongFieldError

FILE = "routes.yaml"

MAX_WEIGHT = 1_000_000
MAX_SLOW_S = 86_400

_HEADER = re.compile(r"header (?P<name>[A-Za-z0-9-]+)")
_RULE = re.compile(r"header (?P<name>[A-Za-z0-9-]+)=(?P<value>[\x21-\x7e]+)")


@dataclass(frozen=True, slots=True)
class RouteFile:
    """How a model's requests are shared between its versions. A request that names a version gets that version."""

    versions: dict[str, float]
    """The weight of each version. A version with weight 0 answers only requests that name it, and those of `always`."""
    sticky: str | None = None
    """`header NAME`: requests with the same value in this header go to the same version."""
    always: dict[str, str] = field(default_factory=dict)
    """`header NAME=VALUE` and a version: requests with that header go to that version, whatever the weights. The first
    rule that matches wins."""
    shadow: dict[str, float] = field(default_factory=dict)
    """A version, and the percentage of requests of which it gets a copy. Its answers are dropped."""
    fallback: str | None = None
    """The version that answers where another version fails (5xx), cannot be reached, or is slow."""
    slow_s: float = 10.0
    """With a `fallback`: seconds after which the fallback answers in place of a slower version. Versions that stream
    their answers have no such limit."""

    def __post_init__(self) -> None:
        for version, weight in self.versions.items():
            if not 0 <= weight <= MAX_WEIGHT:
                what = f"a weight is at least 0 and at most {MAX_WEIGHT:,}, not {weight:g}"
                raise WrongFieldError(what, "versions", version)
        if not sum(self.versions.values()):
            raise WrongFieldError("no version has a weight over 0", "versions")
        for version, percent in self.shadow.items():
            if not 0 < percent <= 100:  # noqa: PLR2004
                what = f"a shadow gets more than 0 and at most 100 percent, not {percent:g}"
                raise WrongFieldError(what, "shadow", version)
        if self.sticky is not None and not _HEADER.fullmatch(self.sticky):
            raise WrongFieldError(f'"{self.sticky}" is not "header NAME"', "sticky")
        for rule in self.always:
            if not _RULE.fullmatch(rule):
                raise WrongFieldError(f'"{rule}" is not "header NAME=VALUE"', "always", rule)
        if not 0 < self.slow_s <= MAX_SLOW_S:
            raise WrongFieldError(f"{self.slow_s:g} is not more than 0 and at most {MAX_SLOW_S:,}", "slow_s")

    @property
    def named(self) -> set[str]:
        """Every version that the route names."""
        return {*self.versions, *self.always.values(), *self.shadow, *filter(None, [self.fallback])}

    @property
    def sticky_header(self) -> str | None:
        match = _HEADER.fullmatch(self.sticky or "")
        return match["name"].lower() if match else None

    @property
    def headers(self) -> set[str]:
        """Every header that the route depends on."""
        return {name for name, _, _ in self.rules} | ({self.sticky_header} if self.sticky_header else set())

    @property
    def rules(self) -> list[tuple[str, str, str]]:
        """Header, value and version of each rule, in order of precedence."""
        found = ((_RULE.fullmatch(rule), version) for rule, version in self.always.items())
        return [(rule["name"].lower(), rule["value"], version) for rule, version in found if rule]


Routes = dict[str, RouteFile]


def read(root: Path) -> Source[Routes] | None:
    """The project's routes; None without a `routes.yaml`. Raises CheckError."""
    path = root / FILE
    return source.read(path, Routes) if path.is_file() else None


def check(routes: Source[Routes], known: Mapping[str, Sequence[str]], more: str = "") -> None:
    """Raises CheckError for models and versions that are not `known`; `more` is how to make others known."""
    problems = [problem for name in routes.value for problem in _problems(routes, name, known, more)]
    if problems:
        raise CheckError(problems)


def _problems(routes: Source[Routes], name: str, known: Mapping[str, Sequence[str]], more: str) -> list[Problem]:
    more = f"; {more}" if more else ""
    if name not in known:
        return [routes.problem((name,), f'there is no model "{name}"', plain.did_you_mean(name, list(known)) + more)]
    route = routes.value[name]
    named: list[tuple[tuple[str, ...], str]] = [(("versions", one), one) for one in route.versions]
    named += [(("always", rule), one) for rule, one in route.always.items()]
    named += [(("shadow", one), one) for one in route.shadow]
    named += [(("fallback",), route.fallback)] if route.fallback else []
    return [
        routes.problem((name, *path), f'{name}: there is no version "{one}"', f"known: {', '.join(known[name])}{more}")
        for path, one in named
        if one not in known[name]
    ]
