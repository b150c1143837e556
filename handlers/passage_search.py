"""Finds the passages of an index of documents that fit a question, by their meaning, their words, or both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchserve_dag import Embedding, Handler, InputError, PassageIndex, Passages, Placement, Query, SearchSettings


class PassageSearch(Handler[Query, Query, Passages, Passages]):
    """A question with its vector → passages, best first, and the index's version that had them."""

    Settings = SearchSettings

    def load(self, folder: Path, settings: SearchSettings, placement: Placement) -> None:  # noqa: ARG002 (no model)
        self.index = PassageIndex(folder.parent, settings)
        self.warms_up = self.index.width is not None  # the index may come later

    def example(self) -> Query:
        return Query("Where does the front door listen?", Embedding([1.0] * (self.index.width or 1)))

    def preprocess(self, item: Query) -> Query:
        if not item.text.strip():
            raise InputError("The question is blank; send at least a word.", 422)
        return item

    def infer(self, batch: Sequence[Query]) -> list[Passages]:
        return [self.index.search(query) for query in batch]

    def postprocess(self, output: Passages, item: Query) -> Passages:  # noqa: ARG002 (the contract's)
        return output
