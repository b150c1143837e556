"""The functions of detect_classify: what happens between its models, and how its answer reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torchserve_dag import Box, DetectedObject, Label, Labels, Objects, Photo, Skipped

NAMED = 3
"""How many objects a sentence names before it only counts."""


@dataclass(frozen=True, slots=True)
class NamedObject:
    """One object: what the detector calls it, where it is, and what the classifier calls it."""

    label: str
    score: float
    box: Box
    names: list[Label]
    """Best first; empty where the object was not classified."""


@dataclass(frozen=True, slots=True)
class Description:
    objects: list[NamedObject]
    summary: str


def crop(photo: Photo, found: DetectedObject) -> Photo:
    """The part of the photo that shows one object."""
    return photo.crop(found.box)


def describe(found: Objects, names: list[Labels]) -> Description:
    """Version 1: the objects, and how many of each there are."""
    objects = [_named(one, labels) for one, labels in zip(found.objects, names, strict=True)]
    counts = Counter(one.label for one in objects)
    return Description(objects, ", ".join(f"{count} {label}" for label, count in counts.items()) or "nothing found")


def describe_in_words(found: Objects, names: list[Labels | Skipped]) -> Description:
    """Version 2: a sentence with each object's finer name and place; objects that were skipped stay unnamed."""
    objects = [_named(one, labels) for one, labels in zip(found.objects, names, strict=True)]
    sure = [one for one in objects if one.names]
    parts = [f"{_name(one)} {_place(one.box, found)}" for one in sure[:NAMED]]
    if len(sure) > NAMED:
        parts.append(f"{len(sure) - NAMED} more")
    if len(sure) < len(objects):
        parts.append(f"{len(objects) - len(sure)} that the detector is unsure of")
    if not parts:
        return Description(objects, "Nothing that the detector knows is in this photo.")
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return Description(objects, f"The photo shows {listed}.")


def _named(one: DetectedObject, labels: Labels | Skipped) -> NamedObject:
    return NamedObject(one.label, one.score, one.box, [] if isinstance(labels, Skipped) else labels.labels)


def _name(one: NamedObject) -> str:
    return f"a {one.label} ({one.names[0].name})"


def _place(box: Box, photo: Objects) -> str:
    """Which ninth of the photo the middle of `box` is in, in words."""
    across = ("on the left", "in the middle", "on the right")[_third((box.left + box.right) / 2, photo.width)]
    down = ("at the top", "", "at the bottom")[_third((box.top + box.bottom) / 2, photo.height)]
    return f"{down} {across}".strip()


def _third(position: float, size: int) -> int:
    return min(2, max(0, int(3 * position / size)))
