"""The functions of languages.yaml: what happens before and after its model."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from torchserve_dag import InputError, Labels, Text


@dataclass(frozen=True, slots=True)
class Sentence:
    text: str
    language: str
    score: float
    """0 to 1."""


@dataclass(frozen=True, slots=True)
class Report:
    """The workflow's answer; a client gets it as JSON."""

    sentences: list[Sentence]
    summary: str


def split(text: Text) -> list[Text]:
    """The sentences of a text; all of them, from all requests, share batches in the next node."""
    parts = re.split(r"(?<=[.!?])\s+", text.text.strip())
    sentences = [Text(part) for part in parts if part]
    if not sentences:
        raise InputError("The text is blank; send at least a sentence.", 422)
    return sentences


def report(sentences: list[Text], languages: list[Labels]) -> Report:
    found = [
        Sentence(text.text, labels.best.name, labels.best.score)
        for text, labels in zip(sentences, languages, strict=True)
    ]
    counts = Counter(sentence.language for sentence in found)
    return Report(found, ", ".join(f"{count} {language}" for language, count in counts.items()))
