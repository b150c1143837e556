"""Verifies weights against the hashes in their cards: weights without a hash are not packed."""

from __future__ import annotations

from collections.abc import Iterable

from torchserve_dag.runtime.data.source import CheckError, Problem, Source
from torchserve_dag.runtime.project.folders import Project, is_below
from torchserve_dag.runtime.project.handler_file import HandlerFile, Weights
from torchserve_dag.runtime.project.weight_files import sha256


class MissingWeightsError(CheckError):
    """Weights that a card names are not on this machine; the handlers have no other problem."""


def verified(project: Project, handlers: Iterable[Source[HandlerFile]]) -> dict[str, str]:
    """The sha256 of every file or folder of weights that the handlers' cards name, by its name below `weights/`.

    Raises CheckError if weights differ from their card, or the card has no sha256; MissingWeightsError if the only
    problem is that weights are not on this machine, and no worker fetches them.
    """
    missing: list[Problem] = []
    wrong: list[Problem] = []
    digests: dict[str, str] = {}
    for source in handlers:
        for i, weights in enumerate(source.value.card.weights):
            at = ("card", "weights", i)
            path = project.weights / weights.file
            if not is_below(weights.file):
                wrong.append(
                    source.problem((*at, "file"), f'"{weights.file}" is not below weights/', "write a path inside it")
                )
            elif path.exists():
                digest = digests.setdefault(weights.file, sha256(path))
                wrong += _differs(source, i, weights, digest)
            elif not weights.fetch_from:
                get = f"get them with: {weights.get}" if weights.get else f"they come from {weights.source}"
                missing.append(source.problem((*at, "file"), f"there are no weights {path}", get))
            elif weights.sha256 is None:
                help_ = f"write their sha256, or put them into {path} and run torchserve-dag build --update-cards"
                wrong.append(source.problem(at, f"{weights.file}: the card has no sha256", help_))
            elif digests.setdefault(weights.file, weights.sha256) != weights.sha256:
                what = f"{weights.file}: another card has another sha256 for it"
                wrong.append(source.problem((*at, "sha256"), what, "give one of the two another name"))
    if wrong:
        raise CheckError(wrong + missing)
    if missing:
        raise MissingWeightsError(missing)
    return digests


def _differs(source: Source[HandlerFile], number: int, weights: Weights, digest: str) -> list[Problem]:
    """What is wrong if weights with this sha256 are not those of the card."""
    at = ("card", "weights", number)
    if weights.sha256 is None:
        help_ = f"write sha256: {digest}, or let torchserve-dag build --update-cards write it"
        return [source.problem(at, f"{weights.file}: the card has no sha256", help_)]
    if weights.sha256 == digest:
        return []
    what = f"{weights.file}: its sha256 is {digest}, and the card says {weights.sha256}"
    again = f"get them again with: {weights.get}" if weights.get else f"get them from {weights.source}"
    help_ = f"{again}; or, if these are the right ones: torchserve-dag build --update-cards"
    return [source.problem((*at, "sha256"), what, help_)]
