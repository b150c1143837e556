"""Finds objects of the 80 COCO classes in a photo, with YOLOv3-tiny."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from torchserve_dag import Box, DetectedObject, Handler, Objects, Photo, Placement

SIDE = 416
"""Pixels a side of the square that the model sees."""
NORM_EPS = 1e-6
ANCHORS = {13: ((81, 82), (135, 169), (344, 319)), 26: ((10, 14), (23, 27), (37, 58))}
"""Cells a side → the widths and heights, in pixels of the square, of that grid's three boxes a cell."""


@dataclass(frozen=True, slots=True)
class YoloSettings:
    weights: str = "yolov3-tiny.safetensors"
    names: str = "coco.names"
    threshold: float = 0.25
    """Objects with a lower score are left out."""
    overlap: float = 0.45
    """Of two boxes of one class that overlap more (intersection over union), the better one stays."""
    most: int = 100
    """Objects that one photo may have; the best are kept."""

    def __post_init__(self) -> None:
        if not (0 < self.threshold < 1 and 0 < self.overlap <= 1 and self.most >= 1):
            raise ValueError("threshold and overlap lie between 0 and 1, and most is at least 1")


class YoloDetector(Handler[Photo, Tensor, Tensor, Objects]):
    """Photo → its objects, in pixels of the upright photo, best score first."""

    Settings = YoloSettings

    def load(self, folder: Path, settings: YoloSettings, placement: Placement) -> None:
        self.settings = settings
        self.placement = placement
        self.names = (folder / settings.names).read_text("utf-8").split("\n")[:80]
        model = YoloV3Tiny()
        model.load(load_file(folder / settings.weights))
        self.model = placement.put(model)

    def example(self) -> Photo:
        """A made-up scene: warming up needs no file."""
        image = Image.new("RGB", (640, 480), (90, 140, 200))
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 320, 640, 480), fill=(70, 70, 70))
        draw.ellipse((200, 160, 440, 400), fill=(200, 60, 40))
        return Photo(image)

    def preprocess(self, item: Photo) -> Tensor:
        """The photo within a grey square, its sides in proportion: uint8 [3, 416, 416]."""
        width, height = _inside(item.width, item.height)
        square = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
        resized = item.image.resize((width, height), Image.Resampling.BILINEAR)
        square.paste(resized, ((SIDE - width) // 2, (SIDE - height) // 2))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)

    def infer(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """What the model gives for each: float32 [2535, 4 + 80] on the CPU; boxes as corners, then scores."""
        pixels = self.placement.tensor(torch.stack(list(batch))).float() / 255  # [batch, 3, 416, 416]
        return list(self.model(pixels).float().cpu().unbind())

    def postprocess(self, output: Tensor, item: Photo) -> Objects:
        boxes, scores = output[:, :4], output[:, 4:]
        place, label = torch.nonzero(scores > self.settings.threshold, as_tuple=True)
        score = scores[place, label]
        boxes = _on_photo(boxes[place], item.width, item.height)
        kept = _best_of_overlapping(boxes, score, label, self.settings.overlap)[: self.settings.most]
        found = [
            DetectedObject(self.names[label], score, Box(*box))
            for label, score, box in zip(label[kept].tolist(), score[kept].tolist(), boxes[kept].tolist(), strict=True)
        ]
        return Objects(item.width, item.height, found)


class YoloV3Tiny(nn.Module):
    """The network of `yolov3-tiny.cfg`, its batch norms folded into the convolutions.

    J. Redmon, A. Farhadi: YOLOv3: An Incremental Improvement, arXiv:1804.02767.
    """

    def __init__(self) -> None:
        super().__init__()
        sizes = (16, 32, 64, 128, 256, 512, 1024)
        shapes = [(before, after, 3) for before, after in zip((3, *sizes), sizes, strict=False)]
        shapes += [(1024, 256, 1), (256, 512, 3), (512, 255, 1)]  # the head on 13 x 13 cells
        shapes += [(256, 128, 1), (384, 256, 3), (256, 255, 1)]  # the one on 26 x 26
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, size, padding=size // 2) for i, o, size in shapes)
        for cells in ANCHORS:
            corner, size, stride = _grid(cells)
            self.register_buffer(f"corner{cells}", corner)
            self.register_buffer(f"size{cells}", size)
            self.register_buffer(f"stride{cells}", stride)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the weights that `scripts/weights` wrote: `NUMBER.PART` for each convolution."""
        for number, module in enumerate(self.convolutions):
            part = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{number}.")}
            if "gamma" in part:
                scale = part["gamma"] / (part["variance"] + NORM_EPS).sqrt()
                part["weight"] = part["weight"] * scale[:, None, None, None]
                part["bias"] = part["beta"] - part["mean"] * scale
            module.load_state_dict({name: part[name] for name in ("weight", "bias")})

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, 416, 416], 0 to 1, → [batch, 2535, 4 + 80]: left, top, right, bottom in the square, scores."""
        middle = x
        for number in range(7):
            x = self._leaky(number, x)
            if number == 4:  # noqa: PLR2004 (its 26 x 26 cells are what the finer head sees)
                middle = x
            if number < 5:  # noqa: PLR2004
                x = functional.max_pool2d(x, 2, 2)
            elif number == 5:  # noqa: PLR2004 (stride 1: darknet pads right and bottom)
                x = functional.max_pool2d(functional.pad(x, (0, 1, 0, 1), mode="replicate"), 2, 1)
        x = self._leaky(7, x)
        coarse = self.convolutions[9](self._leaky(8, x))
        x = functional.interpolate(self._leaky(10, x), scale_factor=2.0, mode="nearest")
        fine = self.convolutions[12](self._leaky(11, torch.cat((x, middle), 1)))
        return torch.cat((self._decode(coarse, 13), self._decode(fine, 26)), 1)

    def _leaky(self, number: int, x: Tensor) -> Tensor:
        return functional.leaky_relu(self.convolutions[number](x), 0.1, inplace=True)

    def _decode(self, x: Tensor, cells: int) -> Tensor:
        """A head's [batch, 3 * 85, cells, cells] as boxes and scores; a score is objectness times class."""
        x = x.float().reshape(x.shape[0], 3, 85, cells * cells).transpose(2, 3)  # [batch, anchor, cell, 85]
        corner, size, stride = (getattr(self, f"{name}{cells}") for name in ("corner", "size", "stride"))
        centre = (x[..., 0:2].sigmoid() + corner) * stride
        half = x[..., 2:4].exp() * size / 2
        scores = x[..., 4:5].sigmoid() * x[..., 5:].sigmoid()
        return torch.cat((centre - half, centre + half, scores), -1).flatten(1, 2)


def _grid(cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each cell's corner [1, cell, 2], each anchor's size [3, 1, 2], and a cell's side in pixels."""
    row, column = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
    corner = torch.stack((column, row), -1).reshape(1, -1, 2).float()
    return corner, torch.tensor(ANCHORS[cells]).reshape(3, 1, 2).float(), torch.tensor(SIDE / cells)


def _inside(width: int, height: int) -> tuple[int, int]:
    """The photo's size when it just fits the square."""
    scale = min(SIDE / width, SIDE / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _on_photo(boxes: Tensor, width: int, height: int) -> Tensor:
    """Boxes in the square as boxes in the photo, clipped to it."""
    inner_width, inner_height = _inside(width, height)
    left, top = (SIDE - inner_width) // 2, (SIDE - inner_height) // 2
    scale = torch.tensor((width / inner_width, height / inner_height)).repeat(2)
    boxes = (boxes - torch.tensor((left, top)).repeat(2)) * scale
    return boxes.clamp(torch.zeros(4), torch.tensor((width, height)).repeat(2))


def _best_of_overlapping(boxes: Tensor, scores: Tensor, labels: Tensor, overlap: float) -> Tensor:
    """Non-maximum suppression, each class by itself: the places of the boxes to keep, best score first."""
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    far = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    near = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    shared = (far - near).clamp(min=0).prod(-1)  # [box, box]
    close = shared > overlap * (area[:, None] + area[None, :] - shared)
    rivals = (close & (labels[:, None] == labels[None, :])).numpy()
    kept = np.ones(len(order), dtype=bool)
    for place in range(len(order)):
        if kept[place]:
            kept[place + 1 :] &= ~rivals[place, place + 1 :]
    return order[torch.from_numpy(kept)]
