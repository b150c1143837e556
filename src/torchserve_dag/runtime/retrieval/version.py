"""An opened version of an index: searches in its table, by vectors and by words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchserve_dag.runtime.messages import Passage, Query
from torchserve_dag.runtime.retrieval.folder import FORMAT, TABLE, About, IndexFolder
from torchserve_dag.runtime.retrieval.fusion import fused
from torchserve_dag.runtime.retrieval.settings import SearchSettings

PLACE = ["document", "heading", "text", "begin", "end", "line", "page"]
"""The columns of a passage."""
CANDIDATES = 4
"""Of both rankings, so many times the passages that are asked for are fused."""


@dataclass(frozen=True)
class IndexVersion:
    """Threads may share it; a process that was forked may not, for the store has threads of its own."""

    about: About
    table: Any
    """LanceDB's."""
    pid: int

    @classmethod
    def open(cls, folder: IndexFolder, version: int) -> IndexVersion:
        """Raises ImportError, ValueError, OSError, and what LanceDB raises."""
        import lancedb  # noqa: PLC0415 (only who searches needs it)

        about = folder.about(version)
        if about.format != FORMAT:
            raise ValueError(f"it has format {about.format}, and {FORMAT} is read here")
        table = lancedb.connect(folder.of_version(version)).open_table(TABLE)
        return cls(about, table, os.getpid())

    def search(self, query: Query, settings: SearchSettings) -> list[Passage]:
        """The best passages first."""
        if self.pid != os.getpid():
            raise RuntimeError("an index was opened before its process was forked: open one in each process")
        wide = settings.passages * (CANDIDATES if settings.mode == "both" else 1)
        rankings: list[list[Passage]] = []
        if settings.mode != "text":
            rankings.append(self.by_vector(query.embedding.embedding, wide))
        if settings.mode != "vectors":
            rankings.append(self.by_words(query, wide))
        ranked = self._fused(rankings) if len(rankings) > 1 else rankings[0]
        return [one for one in ranked if one.similarity >= settings.least_similarity][: settings.passages]

    def by_vector(self, vector: Sequence[float], most: int) -> list[Passage]:
        """The passages whose vectors are nearest: all are compared, so none is missed."""
        search = self.table.search(list(vector), vector_column_name="vector", query_type="vector")
        rows = search.distance_type("cosine").select([*PLACE, "_distance"]).limit(most).to_list()
        return [_passage(row, 1 - row["_distance"]) for row in rows]

    def by_words(self, query: Query, most: int) -> list[Passage]:
        """The passages that have the query's words, by BM25."""
        search = self.table.search(query.text, query_type="fts", fts_columns="searched")
        rows = search.select([*PLACE, "vector", "_score"]).limit(most).to_list()
        return [_passage(row, _cosine(row["vector"], query.embedding.embedding)) for row in rows]

    @staticmethod
    def _fused(rankings: Sequence[Sequence[Passage]]) -> list[Passage]:
        passages = {(one.document, one.begin): one for ranking in reversed(rankings) for one in ranking}
        return [passages[at] for at in fused([[(one.document, one.begin) for one in each] for each in rankings])]


def _passage(row: dict[str, Any], similarity: float) -> Passage:
    return Passage(**{name: row[name] for name in PLACE}, similarity=float(similarity))


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    product, of_a, of_b = (sum(x * y for x, y in zip(c, d, strict=True)) for c, d in ((a, b), (a, a), (b, b)))
    return float(product / ((of_a * of_b) ** 0.5 or 1.0))
