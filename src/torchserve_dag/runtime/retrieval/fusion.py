"""Reciprocal rank fusion: one ranking of several, whose scores cannot be compared.

Cormack, Clarke and Büttcher, Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods, 2009.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

K = 60
"""As in the paper: the larger, the less the first ranks count."""

T = TypeVar("T", bound=Hashable)


def fused(rankings: Sequence[Sequence[T]]) -> list[T]:
    """All that is in a ranking, the best first; of equals, what comes first in the first ranking."""
    scores: dict[T, float] = {}
    for ranking in rankings:
        for rank, one in enumerate(ranking, 1):
            scores[one] = scores.get(one, 0.0) + 1 / (K + rank)
    return sorted(scores, key=lambda one: -scores[one])
