"""Gives passages their vectors, with a handler of the project, loaded in this process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from torchserve_dag.retrieval.documents import IndexingError
from torchserve_dag.retrieval.splitting import MOST_CHARACTERS, Piece, halved
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.messages import Embedding, Failure, Text
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.workflow import Workflow

RULES = 1
"""Of reading and splitting: with another number, documents are read again."""


def described(root: Path, handler: str) -> tuple[str, str]:
    """A handler as `NAME/VERSION`, and a SHA-256 of all that decides on the vectors of its passages.

    Raises CheckError.
    """
    file = Project(root).handler(handler).value
    weights = {weights.file: weights.sha256 for weights in file.card.weights}
    parts = [RULES, MOST_CHARACTERS, file.name, file.version, plain.flatten(file.settings), weights]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return f"{file.name}/{file.version}", digest


class Embedder:
    """A handler that takes a Text and gives an Embedding. Close it, or use it in a `with`."""

    def __init__(self, root: Path, handler: str) -> None:
        """Load the handler. Raises CheckError, and IndexingError for one that gives no vectors."""
        source = Project(root).handler(handler)
        self._workflow = Workflow.load(source.path)
        graph = self._workflow.graph
        if graph.request is not Text or [value.type for value in graph.output.values.values()] != [Embedding]:
            self.close()
            raise IndexingError(f"{handler} embeds no texts: name a handler that takes a Text and gives an Embedding.")
        self.width = len(self._vectors(["passage"])[0] or ())

    def embed(self, pieces: Sequence[Piece]) -> list[list[tuple[Piece, list[float]]]]:
        """Each passage with its vector, in order; one with too many tokens for the model as several shorter ones.

        Raises IndexingError for a model that fails.
        """
        embedded: list[list[tuple[Piece, list[float]]]] = []
        for piece, vector in zip(pieces, self._vectors([one.searched for one in pieces]), strict=True):
            if vector is None:
                embedded.append([part for parts in self.embed(halved(piece)) for part in parts])
            else:
                embedded.append([(piece, vector)])
        return embedded

    def _vectors(self, texts: Sequence[str]) -> list[list[float] | None]:
        """The texts' vectors; None for a text that the model refuses, because it is too long for it."""
        vectors: list[list[float] | None] = []
        for answer in self._workflow([Text(text) for text in texts]):
            if not isinstance(answer, Failure):
                vectors.append(answer.embedding)
            elif answer.status == HTTPStatus.UNPROCESSABLE_ENTITY:
                vectors.append(None)
            else:
                raise IndexingError(f"The model that embeds has failed: {answer.message}")
        return vectors

    def close(self) -> None:
        self._workflow.close()

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
