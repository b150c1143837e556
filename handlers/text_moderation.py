"""Judges texts by categories, with a text classifier of the Hugging Face hub or a linear filter of words."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from torchserve_dag import Handler, InputError, Moderation, Placement, Text

FILTER, VOCABULARY = "filter.safetensors", "vocabulary.json"
"""The files of a filter of words, in its folder."""
FEWEST = 8
"""Tokens that a passage has at least, for half of it has to overlap."""
AT_ONCE = 16
"""Passages that are judged together, so that a long text needs no more memory than several short ones."""

Passage = dict[str, list[int]]
"""A part of a text: the classifier's inputs, each [token]."""


@dataclass(frozen=True, slots=True)
class Category:
    labels: list[str]
    """The classifier's labels that count as this category: its score is that of the likeliest."""
    threshold: float = 0.5
    """A text with this score or more is in the category, and flagged."""

    def __post_init__(self) -> None:
        if not self.labels or not 0 < self.threshold <= 1:
            raise ValueError("a category has at least one label, and a threshold above 0, at most 1")


@dataclass(frozen=True, slots=True)
class ModerationSettings:
    model: str
    """A folder below `weights/`, with a filter of words or a model of the hub, else the name of a model of the hub."""
    categories: dict[str, Category]
    """Each category that a verdict has, with the classifier's labels for it."""
    revision: str = "main"
    """Of a hub model: a branch, a tag or, best, a commit."""
    max_tokens: int = 256
    """Tokens of a passage, or a filter's words. A longer text is judged in passages that overlap by half; the highest
    score counts."""
    max_characters: int = 100_000
    """A longer text is refused."""

    def __post_init__(self) -> None:
        if not self.categories or self.max_tokens < FEWEST or self.max_characters < 1:
            raise ValueError(f"there is a category, max_tokens is {FEWEST} or more, and max_characters 1 or more")


class Classifier(Protocol):
    """What gives probabilities to passages."""

    labels: list[str]

    def passages(self, text: str) -> list[Passage]:
        """The text in passages, at least one; together they have every token."""

    def probabilities(self, passages: Sequence[Passage]) -> Tensor:
        """Of each passage, float [passage, label] on the CPU."""


class TextModeration(Handler[Text, list[Passage], Tensor, Moderation]):
    """Text → which categories it is in."""

    Settings = ModerationSettings

    def load(self, folder: Path, settings: ModerationSettings, placement: Placement) -> None:
        self.settings = settings
        local = folder / settings.model
        is_filter = (local / FILTER).is_file()
        self.classifier: Classifier = (
            WordFilter(local, settings.max_tokens) if is_filter else HubClassifier(local, settings, placement)
        )
        known = self.classifier.labels
        for name, category in settings.categories.items():
            if unknown := sorted(set(category.labels) - set(known)):
                raise ValueError(f"{name}: {settings.model} has no label {unknown[0]}; it has {', '.join(known)}")
        self.places = {name: [known.index(one) for one in it.labels] for name, it in settings.categories.items()}

    def example(self) -> Text:
        return Text("What a damn fine day it is.")

    def preprocess(self, item: Text) -> list[Passage]:
        limit = self.settings.max_characters
        if len(item.text) > limit:
            raise InputError(f"The text has {len(item.text):,} characters; the limit is {limit:,}.", 422)
        return self.classifier.passages(item.text)

    def infer(self, batch: Sequence[list[Passage]]) -> list[Tensor]:
        """Each text's probabilities, [label]: of each label the highest of all its passages."""
        every = [passage for passages in batch for passage in passages]
        groups = [every[at : at + AT_ONCE] for at in range(0, len(every), AT_ONCE)]
        found = torch.cat([self.classifier.probabilities(group) for group in groups])
        parts = torch.split(found, [len(passages) for passages in batch])
        return [part.amax(0) for part in parts]

    def postprocess(self, output: Tensor, item: Text) -> Moderation:  # noqa: ARG002 (the contract's)
        scores = {name: output[places].max().item() for name, places in self.places.items()}
        categories = {name: scores[name] >= it.threshold for name, it in self.settings.categories.items()}
        return Moderation(any(categories.values()), categories, scores)


class WordFilter:
    """A linear model of which words are in a text: scikit-learn's TfidfVectorizer and calibrated LinearSVC.

    The vocabulary lists the words in the order of the arrays: `idf` [word]; `weight` [model, word]; `bias`, `slope` and
    `offset` [model]. A text is the vector of its words' counts, times `idf`, of length 1. Each model makes a margin m
    of it, and the probability 1 / (1 + exp(slope * m + offset)); the text's is the mean of all models'.
    """

    labels = ["profanity"]  # noqa: RUF012 (a Protocol's)
    _words = re.compile(r"\b\w\w+\b")

    def __init__(self, folder: Path, max_tokens: int) -> None:
        words: list[str] = json.loads((folder / VOCABULARY).read_text("utf-8"))
        self._numbers = {word: number for number, word in enumerate(words)}
        self._arrays = load_file(folder / FILTER)
        self._most = max_tokens

    def passages(self, text: str) -> list[Passage]:
        words = [self._numbers.get(word, -1) for word in self._words.findall(text.lower())]
        step = self._most // 2
        starts = range(0, max(1, len(words) - self._most + step), step)
        return [{"words": words[at : at + self._most]} for at in starts]

    def probabilities(self, passages: Sequence[Passage]) -> Tensor:
        return torch.tensor([[self._probability(passage["words"])] for passage in passages], dtype=torch.float64)

    def _probability(self, words: list[int]) -> float:
        arrays = self._arrays
        known, counts = np.unique([word for word in words if word >= 0], return_counts=True)
        known = known.astype(np.int64)  # of no words at all, numpy makes floats
        vector = counts * arrays["idf"][known]
        vector /= np.linalg.norm(vector) or 1.0
        margins = arrays["weight"][:, known] @ vector + arrays["bias"]
        return float(np.mean(1 / (1 + np.exp(arrays["slope"] * margins + arrays["offset"]))))


class HubClassifier:
    """A text classification model of the hub."""

    def __init__(self, local: Path, settings: ModerationSettings, placement: Placement) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: PLC0415 (a filter has no need)

        name = str(local) if local.is_dir() else settings.model
        self._placement = placement
        self._tokenizer = AutoTokenizer.from_pretrained(name, revision=settings.revision)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, revision=settings.revision, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:  # transformers fills them with random numbers, and answers at random
            raise ValueError(f"{name} is not trained to classify texts: it lacks {min(report['missing_keys'])}")
        places = getattr(model.config, "max_position_embeddings", None)
        if places is not None and settings.max_tokens > places:
            raise ValueError(f"max_tokens is {settings.max_tokens}, and {name} takes {places} at most")
        if not self._tokenizer.is_fast:
            raise ValueError(f"{name} has no tokenizer.json, which texts are cut into passages with")
        if self._tokenizer.pad_token is None:  # as with GPT-2, whose batches end at the first such token
            self._tokenizer.pad_token = self._tokenizer.eos_token
            model.config.pad_token_id = self._tokenizer.pad_token_id
        labels: dict[int, str] = model.config.id2label
        self.labels = [labels[number] for number in range(len(labels))]
        self._each_by_itself = model.config.problem_type == "multi_label_classification"
        self._wants = set(inspect.signature(model.forward).parameters)
        self._most = settings.max_tokens
        self._overlap = (self._most - self._tokenizer.num_special_tokens_to_add()) // 2
        self.passages("It settles the tokenizer's settings: to change them while other threads read fails.")
        self._model = placement.put(model)

    def passages(self, text: str) -> list[Passage]:
        found = self._tokenizer(
            text, truncation=True, max_length=self._most, stride=self._overlap, return_overflowing_tokens=True
        )
        count = len(found["input_ids"])
        return [{key: found[key][at] for key in found if key in self._wants} for at in range(count)]

    def probabilities(self, passages: Sequence[Passage]) -> Tensor:
        padded = self._tokenizer.pad(list(passages), return_tensors="pt")  # [passage, longest]
        inputs = {key: self._placement.tensor(value) for key, value in padded.items()}
        logits: Tensor = self._model(**inputs).logits.float()
        return (logits.sigmoid() if self._each_by_itself else logits.softmax(-1)).cpu()
