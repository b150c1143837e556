"""The network, and what it reads of a text: for train.py and for handlers/language.py alike."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

BUCKETS = 4096
"""Trigrams are hashed into this many rows of the model's table."""


def trigrams(text: str) -> Tensor:
    """The text's trigrams as rows of the table: int64 [trigram], at least one."""
    padded = f" {' '.join(text.lower().split())} "
    return torch.tensor([zlib.crc32(padded[i : i + 3].encode()) % BUCKETS for i in range(len(padded) - 2)])


class LanguageModel(nn.Module):
    """Logits are the mean of one learned row for each trigram."""

    def __init__(self, languages: int) -> None:
        super().__init__()
        self.rows = nn.EmbeddingBag(BUCKETS, languages, mode="mean")

    def forward(self, rows: Tensor, starts: Tensor) -> Tensor:
        """Trigrams of all texts [trigram], and where each text starts [batch] → logits [batch, language]."""
        logits: Tensor = self.rows(rows, starts)
        return logits
