"""Finds objects in a photo with any object detection model of the Hugging Face hub."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from torchserve_dag import Box, DetectedObject, Handler, InputError, Objects, Photo, Placement

MOST_OBLONG = 20
"""A side this many times the other is refused: resized as most models want it, nothing would be left of the other."""


@dataclass(frozen=True, slots=True)
class DetectorSettings:
    model: str
    """A folder below `weights/`, else the name of a model of the hub."""
    revision: str = "main"
    """Of a hub model: a branch, a tag or, best, a commit."""
    threshold: float = 0.5
    """Objects with a lower score are left out."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError("threshold lies between 0 and 1")


class TransformersDetector(Handler[Photo, dict[str, Tensor], tuple[Tensor, Tensor], Objects]):
    """Photo → its objects, in pixels of the upright photo, best score first."""

    Settings = DetectorSettings

    def load(self, folder: Path, settings: DetectorSettings, placement: Placement) -> None:
        self.settings = settings
        self.placement = placement
        local = folder / settings.model
        name = str(local) if local.is_dir() else settings.model
        self.processor = AutoImageProcessor.from_pretrained(name, revision=settings.revision)  # type: ignore[no-untyped-call]
        model, report = AutoModelForObjectDetection.from_pretrained(
            name, revision=settings.revision, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:  # transformers fills them with random numbers, and answers at random
            raise ValueError(f"{name} is not trained to detect objects: it lacks {min(report['missing_keys'])}")
        self.labels: dict[int, str] = model.config.id2label
        self.wants = set(inspect.signature(model.forward).parameters)
        self.model = placement.put(model)

    def example(self) -> Photo:
        """A made-up scene: warming up needs no file."""
        image = Image.new("RGB", (640, 480), (90, 140, 200))
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 320, 640, 480), fill=(70, 70, 70))
        draw.ellipse((200, 160, 440, 400), fill=(200, 60, 40))
        return Photo(image)

    def preprocess(self, item: Photo) -> dict[str, Tensor]:
        """What the model's own processor makes of the photo: `pixel_values` [3, height, width] and, mostly, a mask."""
        if max(item.width, item.height) > MOST_OBLONG * min(item.width, item.height):
            raise InputError(
                f"The photo is {item.width} x {item.height}; send one whose longer side is at most "
                f"{MOST_OBLONG} times its shorter.",
                422,
            )
        inputs = self.processor(images=item.image, return_tensors="pt")
        return {key: value[0] for key, value in inputs.items() if key in self.wants}

    def infer(self, batch: Sequence[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """For each photo its logits [box, class] and its boxes [box, 4], on the CPU.

        Photos of one size go through the model together. Those of other sizes are not padded to it: few
        models look away from the padding altogether, and an answer must not depend on its neighbours.
        """
        by_size: dict[torch.Size, list[int]] = {}
        for place, item in enumerate(batch):
            by_size.setdefault(item["pixel_values"].shape, []).append(place)
        outputs: dict[int, tuple[Tensor, Tensor]] = {}
        for places in by_size.values():
            stacked = {key: torch.stack([batch[place][key] for place in places]) for key in batch[places[0]]}
            found = self.model(**{key: self.placement.tensor(value) for key, value in stacked.items()})
            pairs = zip(found.logits.float().cpu(), found.pred_boxes.float().cpu(), strict=True)
            outputs.update(zip(places, pairs, strict=True))
        return [outputs[place] for place in range(len(batch))]

    def postprocess(self, output: tuple[Tensor, Tensor], item: Photo) -> Objects:
        logits, boxes = output
        result = self.processor.post_process_object_detection(
            SimpleNamespace(logits=logits[None], pred_boxes=boxes[None]),
            threshold=self.settings.threshold,
            target_sizes=[(item.height, item.width)],
        )[0]
        corners = result["boxes"].clamp(torch.zeros(4), torch.tensor((item.width, item.height)).repeat(2))
        found = [
            DetectedObject(self.labels[label], score, Box(*box))
            for label, score, box in zip(
                result["labels"].tolist(), result["scores"].tolist(), corners.tolist(), strict=True
            )
        ]
        return Objects(item.width, item.height, sorted(found, key=lambda one: -one.score))
