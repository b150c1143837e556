"""Writes the table of a new version: passages with their vectors, and an index of their words."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.index import FTS

from torchserve_dag.retrieval.splitting import Piece
from torchserve_dag.runtime.retrieval.folder import TABLE

ROWS = 2_048
"""Written at a time."""


class PassageWriter:
    """The table in a version's folder. Nobody reads it before `finish`."""

    def __init__(self, folder: Path, width: int) -> None:
        self._width = width
        self._schema = pa.schema(
            [
                ("document", pa.string()),
                ("heading", pa.string()),
                ("text", pa.string()),
                ("begin", pa.int64()),
                ("end", pa.int64()),
                ("line", pa.int32()),
                ("page", pa.int32()),
                ("searched", pa.string()),
                ("vector", pa.list_(pa.float32(), width)),
            ]
        )
        self._table: Any = lancedb.connect(folder).create_table(TABLE, schema=self._schema)
        self._rows: list[tuple[str, Piece, list[float]]] = []

    def add(self, document: str, piece: Piece, vector: list[float]) -> None:
        self._rows.append((document, piece, vector))
        if len(self._rows) >= ROWS:
            self._flush()

    def copy(self, folder: Path, documents: Collection[str]) -> None:
        """The passages of some documents, as another version has them."""
        wanted = pa.array(sorted(documents), pa.string())
        table = lancedb.connect(folder).open_table(TABLE)
        for batch in table.search().to_batches(ROWS):
            rows = batch.filter(pc.is_in(batch["document"], wanted)).select(self._schema.names)
            if rows.num_rows:
                self._table.add(rows.cast(self._schema))

    def finish(self) -> int:
        """Write what is left, and index the words. Returns how many passages there are."""
        self._flush()
        # Words of every script are found: Chinese and Thai write no spaces. English words by their stems.
        self._table.create_index("searched", config=FTS(base_tokenizer="icu/split"))
        return int(self._table.count_rows())

    def _flush(self) -> None:
        if not self._rows:
            return
        pieces = [piece for _, piece, _ in self._rows]
        vectors = pa.array([number for _, _, vector in self._rows for number in vector], pa.float32())
        columns: dict[str, Any] = {
            name: [getattr(piece, name) for piece in pieces] for name in self._schema.names[1:-1]
        }
        columns |= {
            "document": [document for document, _, _ in self._rows],
            "vector": pa.FixedSizeListArray.from_arrays(vectors, self._width),
        }
        self._table.add(pa.record_batch(columns, schema=self._schema))
        self._rows = []
