"""A version of an index while it is written: passages come in, get their vectors, and are kept in batches."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torchserve_dag.retrieval.documents import Document
from torchserve_dag.retrieval.embedder import Embedder
from torchserve_dag.retrieval.splitting import Piece
from torchserve_dag.retrieval.versions import PART
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.retrieval.folder import ABOUT, About, Indexed, IndexFolder

if TYPE_CHECKING:
    from torchserve_dag.retrieval.writer import PassageWriter

EMBEDDED_AT_ONCE = 256
"""Passages that wait for their vectors: enough to fill the batches of every core."""


class IndexDraft:
    """The model is loaded, and the table is made, only where there is something to embed or to write.

    Use it in a `with`: what was not published is deleted.
    """

    def __init__(self, root: Path, index: IndexFolder, handler: str, width: int) -> None:
        """`width`: of the vectors of the version before; 0 where there is none."""
        self._root, self._index, self._handler, self.width = root, index, handler, width
        self._folder = index.path / f".new{PART}"
        self._embedder: Embedder | None = None
        self._table: PassageWriter | None = None
        self._waiting: list[tuple[Document, Piece]] = []
        self._passages: Counter[str] = Counter()
        self._digests: dict[str, str] = {}

    @property
    def documents(self) -> dict[str, Indexed]:
        """What was embedded for this version."""
        return {name: Indexed(digest, self._passages[name]) for name, digest in self._digests.items()}

    def add(self, document: Document, pieces: Iterable[Piece]) -> None:
        """Raises CheckError, and IndexingError for a model that fails."""
        self._digests[document.name] = document.sha256
        for piece in pieces:
            self._waiting.append((document, piece))
            if len(self._waiting) >= EMBEDDED_AT_ONCE:
                self.embed()

    def embed(self) -> None:
        """Embed what waits."""
        if not self._waiting:
            return
        if self._embedder is None:
            self._embedder = Embedder(self._root, self._handler)
            self.width = self._embedder.width
        documents = [document.name for document, _ in self._waiting]
        embedded = self._embedder.embed([piece for _, piece in self._waiting])
        for document, parts in zip(documents, embedded, strict=True):
            self._passages[document] += len(parts)
            for piece, vector in parts:
                self._writer().add(document, piece, vector)
        self._waiting = []

    def copy(self, version: int, documents: Collection[str]) -> None:
        """The passages of some documents as an earlier version has them."""
        if documents:
            self._writer().copy(self._index.of_version(version), documents)

    def finish(self) -> int:
        """Index the words. Returns how many passages there are."""
        self.embed()
        return self._writer().finish()

    def publish(self, about: About) -> None:
        """Give the version its folder, whole at once."""
        text = json.dumps(plain.flatten(about), indent=1, ensure_ascii=False)
        (self._folder / ABOUT).write_text(text, "utf-8")
        self._folder.rename(self._index.of_version(about.version))

    def _writer(self) -> PassageWriter:
        if self._table is None:
            # After the model: OpenVINO forks a process while it loads one, and the store must not be open then.
            from torchserve_dag.retrieval.writer import PassageWriter  # noqa: PLC0415

            self._table = PassageWriter(self._folder, self.width)
        return self._table

    def __enter__(self) -> IndexDraft:
        return self

    def __exit__(self, *_: object) -> None:
        if self._embedder:
            self._embedder.close()
        shutil.rmtree(self._folder, ignore_errors=True)
