"""Classifies a text with any text classification model of the Hugging Face hub."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from torchserve_dag import Handler, InputError, Label, Labels, Placement, Text

MOST_CHARACTERS_A_TOKEN = 100
"""A text with more for each token that it may have is refused before it is split into tokens."""


@dataclass(frozen=True, slots=True)
class TextSettings:
    model: str
    """A folder below `weights/`, else the name of a model of the hub."""
    revision: str = "main"
    """Of a hub model: a branch, a tag or, best, a commit."""
    top: int = 5
    """Labels in an answer; all, where the model has fewer."""
    max_tokens: int = 512
    """A longer text is refused, not cut: a verdict on its beginning would pass for one on the whole."""

    def __post_init__(self) -> None:
        if min(self.top, self.max_tokens) < 1:
            raise ValueError("top and max_tokens are at least 1")


class TextClassifier(Handler[Text, dict[str, list[int]], Tensor, Labels]):
    """Text → its likeliest classes, best first."""

    Settings = TextSettings

    def load(self, folder: Path, settings: TextSettings, placement: Placement) -> None:
        self.placement = placement
        self.limit = settings.max_tokens
        local = folder / settings.model
        name = str(local) if local.is_dir() else settings.model
        self.tokenizer = AutoTokenizer.from_pretrained(name, revision=settings.revision)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, revision=settings.revision, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:  # transformers fills them with random numbers, and answers at random
            raise ValueError(f"{name} is not trained to classify texts: it lacks {min(report['missing_keys'])}")
        places = getattr(model.config, "max_position_embeddings", None)
        if places is not None and self.limit > places:
            raise ValueError(f"max_tokens is {self.limit}, and {name} takes {places} at most")
        if self.tokenizer.pad_token is None:  # as with GPT-2, whose batches end at the first such token
            self.tokenizer.pad_token = self.tokenizer.eos_token
            model.config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer(self.example().text)  # settles its settings: changing them while other threads read fails
        self.labels: dict[int, str] = model.config.id2label
        self.top = min(settings.top, len(self.labels))
        self.each_by_itself = model.config.problem_type == "multi_label_classification"
        self.wants = set(inspect.signature(model.forward).parameters)
        self.model = placement.put(model)

    def example(self) -> Text:
        return Text("The coffee was excellent and the staff were kind.")

    def preprocess(self, item: Text) -> dict[str, list[int]]:
        """The text as tokens: `input_ids` and `attention_mask`, both [token]."""
        if not item.text.strip():
            raise InputError("The text is blank; send at least a word.", 422)
        if len(item.text) > self.limit * MOST_CHARACTERS_A_TOKEN:  # a text of megabytes takes seconds to split
            raise InputError(f"The text has {len(item.text):,} characters; the limit is {self.limit} tokens.", 422)
        tokens = self.tokenizer(item.text, verbose=False)
        count = len(tokens["input_ids"])
        if count > self.limit:
            raise InputError(
                f"The text has {count} tokens; the limit is {self.limit}, so send it in shorter parts.", 422
            )
        return {key: value for key, value in tokens.items() if key in self.wants}

    def infer(self, batch: Sequence[dict[str, list[int]]]) -> list[Tensor]:
        """Each text's probabilities: [class], on the CPU. The mask keeps padding out of every answer."""
        padded = self.tokenizer.pad(list(batch), return_tensors="pt")  # [batch, longest]
        logits = self.model(**{key: self.placement.tensor(value) for key, value in padded.items()}).logits.float()
        return list((logits.sigmoid() if self.each_by_itself else logits.softmax(-1)).cpu().unbind())

    def postprocess(self, output: Tensor, item: Text) -> Labels:  # noqa: ARG002 (the contract's)
        scores, places = output.topk(self.top)
        best = zip(places.tolist(), scores.tolist(), strict=True)
        return Labels([Label(self.labels[place], score) for place, score in best])
