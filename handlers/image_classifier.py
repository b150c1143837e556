"""Names what a photo shows, of the 1,000 ImageNet classes, with EfficientNet-Lite0."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from torchserve_dag import Handler, Label, Labels, Photo, Placement

SIDE = 224
"""Pixels a side of the square that the model sees."""
OF_SHORT_SIDE = 224 / 256
"""The square's part of the photo's shorter side: "short side 256, crop 224"."""
NORM_EPS = 1e-3
STAGES = (
    # blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


@dataclass(frozen=True, slots=True)
class ClassifierSettings:
    weights: str = "efficientnet-lite0.safetensors"
    names: str = "imagenet-names.json"
    top: int = 5
    """Labels in an answer."""
    views: Literal[1, 2] = 1
    """2 looks at the photo and at its mirror image, and answers with the mean: twice the work."""

    def __post_init__(self) -> None:
        if not 1 <= self.top <= 1000:  # noqa: PLR2004
            raise ValueError("top lies between 1 and 1000")


class ImageClassifier(Handler[Photo, Tensor, Tensor, Labels]):
    """Photo → the likeliest classes, best first."""

    Settings = ClassifierSettings

    def load(self, folder: Path, settings: ClassifierSettings, placement: Placement) -> None:
        self.settings = settings
        self.placement = placement
        self.names: list[str] = json.loads((folder / settings.names).read_text("utf-8"))
        model = EfficientNetLite0()
        model.load(load_file(folder / settings.weights))
        self.model = placement.put(model)

    def example(self) -> Photo:
        """A made-up ball on grass: warming up needs no file."""
        image = Image.new("RGB", (320, 240), (60, 140, 50))
        ImageDraw.Draw(image).ellipse((100, 60, 220, 180), fill=(240, 240, 240))
        return Photo(image)

    def preprocess(self, item: Photo) -> Tensor:
        """The middle of the photo: uint8 [3, 224, 224]."""
        side = min(item.width, item.height) * OF_SHORT_SIDE
        left, top = (item.width - side) / 2, (item.height - side) / 2
        # Cropping and resizing in one step: a crop that is one pixel high would else grow a thousandfold.
        square = item.image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)

    def infer(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """Each photo's probabilities: float32 [1000] on the CPU."""
        pixels = self.placement.tensor(torch.stack(list(batch)))  # [batch, 3, 224, 224]
        pixels = (pixels.float() - 127) / 128
        views = [pixels, pixels.flip(-1)][: self.settings.views]
        scores = self.model(torch.cat(views)).float().softmax(-1)
        return list(scores.unflatten(0, (len(views), -1)).mean(0).cpu().unbind())

    def postprocess(self, output: Tensor, item: Photo) -> Labels:  # noqa: ARG002 (the contract's)
        scores, places = output.topk(self.settings.top)
        best = zip(places.tolist(), scores.tolist(), strict=True)
        return Labels([Label(self.names[place], score) for place, score in best])


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, its batch norms folded into the convolutions.

    M. Tan, Q. Le: EfficientNet, arXiv:1905.11946; the Lite variants have ReLU6 in place of swish
    and no squeeze-and-excitation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = SamePadded(3, 32, 3, stride=2)
        blocks: list[Block] = []
        before = 32
        for count, kernel, first_stride, expansion, channels in STAGES:
            for i in range(count):
                blocks.append(Block(before, channels, kernel, first_stride if i == 0 else 1, expansion))
                before = channels
        self.blocks = nn.ModuleList(blocks)
        self.head = SamePadded(before, 1280, 1)
        self.classes = nn.Linear(1280, 1000)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the weights that `scripts/weights` wrote: `NUMBER.PART` for each convolution, and `classes`."""
        convolutions = [module for module in self.modules() if isinstance(module, nn.Conv2d)]  # in running order
        for number, module in enumerate(convolutions):
            part = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{number}.")}
            scale = part["gamma"] / (part["variance"] + NORM_EPS).sqrt()
            weight = part["weight"] * scale[:, None, None, None]
            module.load_state_dict({"weight": weight, "bias": part["beta"] - part["mean"] * scale})
        self.classes.load_state_dict({part: tensors[f"classes.{part}"] for part in ("weight", "bias")})

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, 224, 224], about -1 to 1, → logits [batch, 1000]."""
        x = functional.relu6(self.stem(x), inplace=True)
        for block in self.blocks:
            x = block(x)
        x = functional.relu6(self.head(x), inplace=True)
        return self.classes(x.mean((2, 3)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """An inverted bottleneck: wider, a depthwise convolution, narrower; added to its input where it can be."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = before * expansion
        self.expand = SamePadded(before, wide, 1) if expansion > 1 else None
        self.depthwise = SamePadded(wide, wide, kernel, stride=stride, groups=wide)
        self.project = SamePadded(wide, after, 1)
        self.adds = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x if self.expand is None else functional.relu6(self.expand(x), inplace=True)
        y = self.project(functional.relu6(self.depthwise(y), inplace=True))
        return x + y if self.adds else y


class SamePadded(nn.Conv2d):
    """A convolution padded as TensorFlow does: with stride 2, a pixel less at the left and top."""

    def __init__(self, before: int, after: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        even = (kernel - 1) // 2 if stride == 1 else 0
        super().__init__(before, after, kernel, stride, padding=even, groups=groups)
        less = (kernel - 2) // 2
        self.pad = (less, kernel - 2 - less) * 2 if stride == 2 else None  # noqa: PLR2004 (every side here is even)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.pad is None else functional.pad(x, self.pad))
