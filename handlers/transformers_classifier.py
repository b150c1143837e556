"""Names what a photo shows with any image classification model of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from torchserve_dag import Handler, InputError, Label, Labels, Photo, Placement

MOST_OBLONG = 20
"""A side this many times the other is refused: a processor that keeps proportions would make it huge."""


@dataclass(frozen=True, slots=True)
class ClassifierSettings:
    model: str
    """A folder below `weights/`, else the name of a model of the hub."""
    revision: str = "main"
    """Of a hub model: a branch, a tag or, best, a commit."""
    top: int = 5
    """Labels in an answer; all, where the model has fewer."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError("top is at least 1")


class TransformersClassifier(Handler[Photo, Tensor, Tensor, Labels]):
    """Photo → the likeliest classes, best first."""

    Settings = ClassifierSettings

    def load(self, folder: Path, settings: ClassifierSettings, placement: Placement) -> None:
        self.placement = placement
        local = folder / settings.model
        name = str(local) if local.is_dir() else settings.model
        self.processor = AutoImageProcessor.from_pretrained(name, revision=settings.revision)  # type: ignore[no-untyped-call]
        model, report = AutoModelForImageClassification.from_pretrained(
            name, revision=settings.revision, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:  # transformers fills them with random numbers, and answers at random
            raise ValueError(f"{name} is not trained to classify photos: it lacks {min(report['missing_keys'])}")
        self.labels: dict[int, str] = model.config.id2label
        self.top = min(settings.top, len(self.labels))
        self.each_by_itself = model.config.problem_type == "multi_label_classification"
        self.model = placement.put(model)

    def example(self) -> Photo:
        """A made-up ball on grass: warming up needs no file."""
        image = Image.new("RGB", (320, 240), (60, 140, 50))
        ImageDraw.Draw(image).ellipse((100, 60, 220, 180), fill=(240, 240, 240))
        return Photo(image)

    def preprocess(self, item: Photo) -> Tensor:
        """What the model's own processor makes of the photo: [3, height, width], of one size for every photo."""
        if max(item.width, item.height) > MOST_OBLONG * min(item.width, item.height):
            raise InputError(
                f"The photo is {item.width} x {item.height}; send one whose longer side is at most "
                f"{MOST_OBLONG} times its shorter.",
                422,
            )
        pixels: Tensor = self.processor(images=item.image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def infer(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """Each photo's probabilities: [class], on the CPU."""
        logits = self.model(pixel_values=self.placement.tensor(torch.stack(list(batch)))).logits.float()
        return list((logits.sigmoid() if self.each_by_itself else logits.softmax(-1)).cpu().unbind())

    def postprocess(self, output: Tensor, item: Photo) -> Labels:  # noqa: ARG002 (the contract's)
        scores, places = output.topk(self.top)
        best = zip(places.tolist(), scores.tolist(), strict=True)
        return Labels([Label(self.labels[place], score) for place, score in best])
