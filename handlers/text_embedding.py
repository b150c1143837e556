"""Turns a text into a vector with an embedding model of the Hugging Face hub: BERT, RoBERTa and their kin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from torchserve_dag import Embedding, Handler, InputError, Placement, Text, Usage

MOST_CHARACTERS_A_TOKEN = 100
"""A text with more for each token that it may have is refused before it is split into tokens."""
TOLERANCE = 1e-3
"""Between a text's vector alone and beside another, of the largest value."""


@dataclass(frozen=True, slots=True)
class EmbeddingSettings:
    model: str
    """A folder below `weights/`, else the name of a model of the hub."""
    revision: str = "main"
    """Of a hub model: a branch, a tag or, best, a commit."""
    max_tokens: int = 256
    """A longer text is refused, not cut: its vector would be that of its beginning."""
    normalize: bool = True
    """Whether vectors have the length 1, so that their dot product is the cosine of their angle."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError("max_tokens is at least 1")


class TextEmbedding(Handler[Text, list[int], tuple[Tensor, int], Embedding]):
    """Text → the mean of its tokens' vectors."""

    Settings = EmbeddingSettings

    def load(self, folder: Path, settings: EmbeddingSettings, placement: Placement) -> None:
        self.settings, self.placement = settings, placement
        local = folder / settings.model
        name = str(local) if local.is_dir() else settings.model
        self.tokenizer = AutoTokenizer.from_pretrained(name, revision=settings.revision)
        model = AutoModel.from_pretrained(name, revision=settings.revision, dtype=torch.float32).eval()
        places = model.config.max_position_embeddings
        if settings.max_tokens > places:
            raise ValueError(f"max_tokens is {settings.max_tokens}, and {name} takes {places} at most")
        tokens = self.tokenizer(self.example().text)["input_ids"]  # settles the tokenizer's settings, for all threads
        packed = Packed(model)
        check_packing(packed, tokens, name)
        self.model = placement.put(packed)

    def example(self) -> Text:
        return Text("The front door shares the requests between the versions of a model.")

    def preprocess(self, item: Text) -> list[int]:
        """The text's tokens: [token]."""
        if not item.text.strip():
            raise InputError("The text is blank; send at least a word.", 422)
        limit = self.settings.max_tokens
        if len(item.text) > limit * MOST_CHARACTERS_A_TOKEN:  # a text of megabytes takes seconds to split
            raise InputError(f"The text has {len(item.text):,} characters; the limit is {limit} tokens.", 422)
        tokens: list[int] = self.tokenizer(item.text, verbose=False)["input_ids"]
        if len(tokens) > limit:
            raise InputError(f"The text has {len(tokens)} tokens; the limit is {limit}, so send it in parts.", 422)
        return tokens

    def infer(self, batch: Sequence[list[int]]) -> list[tuple[Tensor, int]]:
        """Each text's vector, float32 [width] on the CPU, and how many tokens it has."""
        packed = [self.placement.tensor(each) for each in pack(batch)]
        sizes = [len(tokens) for tokens in batch]
        states = self.model(*packed).float().cpu().split(sizes)  # of each text [token, width]
        vectors = torch.stack([each.mean(0) for each in states])
        if self.settings.normalize:
            vectors = nn.functional.normalize(vectors)
        return list(zip(vectors.unbind(), sizes, strict=True))

    def postprocess(self, output: tuple[Tensor, int], item: Text) -> Embedding:  # noqa: ARG002 (the contract's)
        vector, tokens = output
        return Embedding(vector.tolist(), Usage.of(tokens))


class Packed(nn.Module):
    """The model on the tokens of several texts in a row, in which no text sees another.

    So nothing is padded, and the only size that changes is the first: OpenVINO computes texts of every length.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        places = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        padding = getattr(places, "padding_idx", None)
        self.first_place = 0 if padding is None else int(padding) + 1  # RoBERTa counts from after its padding

    def forward(self, tokens: Tensor, places: Tensor, texts: Tensor) -> Tensor:
        """The token, its place in its text, and which text that is, each int64 [token] → states [token, width]."""
        sees = (texts[:, None] == texts[None, :])[None, None]  # [1, 1, token, token]
        places = places[None] + self.first_place
        output = self.model(input_ids=tokens[None], position_ids=places, attention_mask=sees)
        return output.last_hidden_state[0]  # type: ignore[no-any-return]


def pack(batch: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Texts in a row: tokens, places and texts, as `Packed` takes them."""
    tokens = torch.tensor([token for text in batch for token in text])
    places = torch.cat([torch.arange(len(text)) for text in batch])
    texts = torch.tensor([number for number, text in enumerate(batch) for _ in text])
    return tokens, places, texts


def check_packing(packed: Packed, tokens: list[int], name: str) -> None:
    """Raises ValueError if the model does not keep texts apart: it must take places, and a mask of pairs of tokens."""
    with torch.inference_mode():
        alone = packed.model(torch.tensor([tokens])).last_hidden_state[0]
        try:
            beside = packed(*pack([tokens[::-1], tokens]))[len(tokens) :]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} is no encoder that this handler can pack: {error}") from None
    off = (alone - beside).abs().max() / alone.abs().max()
    if not off <= TOLERANCE:
        raise ValueError(f"{name} cannot be packed: beside another text, a text's states differ by {off:.2g}")
