"""The settings of a search: which index, and what of it is near enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchserve_dag.runtime.messages import WrongFieldError

Mode = Literal["vectors", "text", "both"]
MOST_PASSAGES = 50


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """What stands under `settings:` of a handler like `passage_search`."""

    index: str
    """The index: a folder in `indexes/`."""
    passages: int = 4
    """How many passages an answer has at most."""
    least_similarity: float = 0.0
    """A passage whose meaning is further from the query's than this is left out, whatever words it has: -1 to 1."""
    mode: Mode = "both"
    """How passages are ranked: by `vectors` (by meaning), by `text` (by the words that they have, with BM25), or by
    `both` (the two rankings fused by reciprocal ranks)."""

    def __post_init__(self) -> None:
        if not 1 <= self.passages <= MOST_PASSAGES:
            raise WrongFieldError(f"passages is 1 to {MOST_PASSAGES}", "passages")
        if not -1 <= self.least_similarity <= 1:
            raise WrongFieldError("least_similarity is -1 to 1", "least_similarity")
        if "/" in self.index or self.index.startswith(".") or not self.index:
            raise WrongFieldError(f'"{self.index}" is no index; write the name of a folder in indexes/', "index")
