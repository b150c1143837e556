"""How good detect_classify's answers are: scores of this project's own, for `torchserve-dag evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from workflows.detect_classify import Description


@dataclass(frozen=True, slots=True)
class Labelled:
    """What a photo of `photos.jsonl` shows, as a person sees it."""

    objects: list[dict[str, str]]
    """The objects of classes that the detector knows."""
    names: list[str] = field(default_factory=list)
    """The finer names that are right for some of them."""


def names_right(answer: Description, expected: Labelled) -> float:
    """The share of the named objects whose first name is right; 1 where nothing is named, and nothing has a name."""
    first = [one.names[0].name for one in answer.objects if one.names]
    if not first:
        return float(not expected.names)
    return sum(name in expected.names for name in first) / len(first)


def summed_up(answer: Description, expected: Labelled) -> bool:
    """Whether the summary has a right name of what is there; where nothing is there, whether it says so."""
    if not expected.objects:
        return not answer.objects
    return any(name in answer.summary for name in expected.names)
