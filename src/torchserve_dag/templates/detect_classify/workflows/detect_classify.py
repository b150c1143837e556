"""The functions of detect_classify.yaml: between its models, and for its answer."""

from __future__ import annotations

from dataclasses import dataclass

from torchserve_dag import Box, DetectedObject, Label, Labels, Objects, Photo


@dataclass(frozen=True, slots=True)
class NamedObject:
    """One object: the detector's label, score and box, and the classifier's names."""

    label: str
    score: float
    """0 to 1."""
    box: Box
    names: list[Label]
    """Best first."""


@dataclass(frozen=True, slots=True)
class Description:
    """The workflow's answer; a client gets it as JSON."""

    objects: list[NamedObject]


def crop(photo: Photo, found: DetectedObject) -> Photo:
    """The part of the photo that shows one object."""
    return photo.crop(found.box)


def describe(found: Objects, names: list[Labels]) -> Description:
    pairs = zip(found.objects, names, strict=True)
    return Description([NamedObject(one.label, one.score, one.box, labels.labels) for one, labels in pairs])
