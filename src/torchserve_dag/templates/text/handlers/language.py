"""Identifies the language of a sentence with a linear model over its trigrams."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchserve_dag import Handler, InputError, Label, Labels, Placement, Text

from language_model import LanguageModel, trigrams


@dataclass(frozen=True, slots=True)
class LanguageSettings:
    top: int = 3
    """Languages in an answer."""


class Language(Handler[Text, Tensor, Tensor, Labels]):
    """Text → its likeliest languages, best first."""

    Settings = LanguageSettings

    def load(self, folder: Path, settings: LanguageSettings, placement: Placement) -> None:
        self.languages: list[str] = json.loads((folder / "language" / "languages.json").read_text("utf-8"))
        self.top = min(settings.top, len(self.languages))
        model = LanguageModel(len(self.languages))
        model.load_state_dict(load_file(folder / "language" / "model.safetensors"))
        self.placement = placement
        self.model = placement.put(model)

    def example(self) -> Text:
        return Text("The coffee was excellent.")

    def preprocess(self, item: Text) -> Tensor:
        """The text's trigrams: [trigram]."""
        if not item.text.strip():
            raise InputError("The text is blank; send at least a word.", 422)
        return trigrams(item.text)

    def infer(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """Each text's probabilities: float32 [language] on the CPU."""
        ends = torch.tensor([len(rows) for rows in batch]).cumsum(0)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
        logits = self.model(self.placement.tensor(torch.cat(list(batch))), self.placement.tensor(starts))
        return list(logits.softmax(-1).cpu().unbind())

    def postprocess(self, output: Tensor, item: Text) -> Labels:
        scores, places = output.topk(self.top)
        best = zip(places.tolist(), scores.tolist(), strict=True)
        return Labels([Label(self.languages[place], score) for place, score in best])
