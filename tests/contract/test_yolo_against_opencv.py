"""The detector against another reader of the same weights: OpenCV's, of darknet's own files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from torchserve_dag.runtime.messages import Photo
from torchserve_dag.runtime.models.stages import Stages
from torchserve_dag.runtime.project.folders import Project

LEAST = 0.01
"""OpenCV makes every lower score 0; its own default is 0.2, over all that it sees in the astronaut."""


@pytest.fixture(scope="module")
def opencv(project: Project, tmp_path_factory: pytest.TempPathFactory) -> cv2.dnn.Net:
    """OpenCV's network from the files as they were published, but for the threshold in the cfg."""
    original = project.weights / "original"
    cfg: Path = tmp_path_factory.mktemp("darknet") / "yolov3-tiny.cfg"
    text = (original / "yolov3-tiny.cfg").read_text("utf-8")
    cfg.write_text(text.replace("[yolo]", f"[yolo]\nthresh={LEAST}"), "utf-8")
    return cv2.dnn.readNetFromDarknet(str(cfg), str(original / "yolov3-tiny.weights"))


@pytest.mark.parametrize("name", ["coffee.jpg", "astronaut.jpg", "motorcycle.jpg", "many.jpg"])
def test_scores_and_boxes_are_those_of_opencv(
    opencv: cv2.dnn.Net, load: Callable[[str], Stages], photo: Callable[[str], Photo], name: str
) -> None:
    """Every score that OpenCV gives is ours to four decimals, class by class, and its box to 0.01 pixels."""
    detector = load("yolo_detector").handler
    square = detector.preprocess(photo(name))
    with torch.inference_mode():
        ours = _cell_by_cell(detector.infer([square])[0].numpy())
    opencv.setInput(square[None].numpy().astype(np.float32) / 255)
    theirs = np.concatenate(opencv.forward(opencv.getUnconnectedOutLayersNames()))  # [2535, 4 + 1 + 80]
    centre, half, scores = theirs[:, :2] * 416, theirs[:, 2:4] * 416 / 2, theirs[:, 5:]
    corners = np.concatenate((centre - half, centre + half), 1)
    seen = scores > 0

    assert seen.any()
    assert np.abs(ours[:, 4:] - scores)[seen].max() < 5e-5
    assert np.abs(ours[:, :4] - corners)[seen.any(1)].max() < 0.01
    assert np.sort(ours[:, 4:], None)[-3:].round(3).tolist() == np.sort(scores, None)[-3:].round(3).tolist()


def _cell_by_cell(output: NDArray[np.float32]) -> NDArray[np.float32]:
    """Ours has all cells of an anchor together; darknet's has all anchors of a cell together."""
    heads = np.split(output, [3 * 13 * 13])
    return np.concatenate([head.reshape(3, -1, 84).transpose(1, 0, 2).reshape(-1, 84) for head in heads])
