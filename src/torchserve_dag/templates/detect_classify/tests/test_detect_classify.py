"""The workflow's functions and, where the weights are here, the workflow itself. Run it with: python -m pytest"""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from torchserve_dag import Box, DetectedObject, Label, Labels, Objects, Photo, Workflow

from workflows.detect_classify import crop, describe

ROOT = Path(__file__).parents[1]
CUP = DetectedObject("cup", 0.9, Box(10, 20, 30, 60))


def test_a_crop_is_the_part_of_the_photo_in_the_box() -> None:
    assert crop(Photo(Image.new("RGB", (100, 100))), CUP).image.size == (20, 40)


def test_each_object_has_the_names_of_its_crop() -> None:
    answer = describe(Objects(100, 100, [CUP]), [Labels([Label("espresso", 0.8)])])

    assert [(one.label, one.names[0].name) for one in answer.objects] == [("cup", "espresso")]


@pytest.mark.skipif(not (ROOT / "weights").is_dir(), reason="the README says how to get the weights")
def test_a_photo_is_answered() -> None:
    photo = io.BytesIO()
    Image.new("RGB", (320, 240), "gray").save(photo, "PNG")
    with Workflow.load(ROOT / "workflows" / "detect_classify.yaml") as workflow:
        (answer,) = workflow([photo.getvalue()])

    assert all(one.names for one in answer.objects)
