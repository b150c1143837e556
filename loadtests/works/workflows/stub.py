"""The function of stub: its answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Named:
    objects: int
    labels: list[str]


def join(found: list[int], labels: list[str]) -> Named:
    return Named(len(found), labels)
