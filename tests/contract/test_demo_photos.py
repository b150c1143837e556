"""What the demo shows: an object found, and its crop named more finely."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from torchserve_dag.runtime.messages import Photo
from torchserve_dag.runtime.models.stages import Stages

Load = Callable[[str], Stages]
Read = Callable[[str], Photo]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize(
    ("name", "label", "finer"), [("coffee.jpg", "cup", "espresso"), ("motorcycle.jpg", "motorbike", "moped")]
)
def test_the_object_is_found_and_its_crop_is_named(
    load: Load, photo: Read, version: str, name: str, label: str, finer: str
) -> None:
    """The cup holds espresso, and the motorbike is a moped, to both versions of the classifier."""
    (found,) = load("yolo_detector")([photo(name)])
    best = found.objects[0]
    (names,) = load(f"image_classifier/{version}")([photo(name).crop(best.box)])

    assert (best.label, names.best.name) == (label, finer)


@pytest.mark.parametrize(
    ("name", "objects"),
    [
        ("coffee.jpg", ["cup"]),
        ("chelsea.jpg", []),
        ("astronaut.jpg", []),
        ("empty.jpg", []),
        ("many.jpg", ["cup"] * 12 + ["diningtable"] * 2),
        ("five.jpg", ["cup"] * 4 + ["diningtable"]),
        ("twenty.jpg", ["cup"] * 20),
        ("motorcycle.jpg", ["motorbike"] * 2),
    ],
)
def test_the_photos_hold_what_their_readme_says(load: Load, photo: Read, name: str, objects: list[str]) -> None:
    """Load tests count on a photo with many objects, and on one with none."""
    (found,) = load("yolo_detector")([photo(name)])

    assert sorted(one.label for one in found.objects) == objects


def test_boxes_lie_in_the_photo_best_score_first(load: Load, photo: Read) -> None:
    """A box can be cut out as it is."""
    (found,) = load("yolo_detector")([photo("many.jpg")])
    scores = [one.score for one in found.objects]

    assert (found.width, found.height) == (900, 400)
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= one.box.left < one.box.right <= 900 for one in found.objects)
    assert all(0 <= one.box.top < one.box.bottom <= 400 for one in found.objects)
