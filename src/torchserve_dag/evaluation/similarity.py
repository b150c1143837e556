"""How near the meaning of a text is to what was expected, by the project's handler `text_embedding`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torchserve_dag.evaluation.scorers import ScoreError, no_texts, text_of, texts_in
from torchserve_dag.runtime.data.source import CheckError, Problem
from torchserve_dag.runtime.messages import Embedding, Failure, Text
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.workflow import Workflow

HANDLER = "text_embedding"


def embedding_file(root: Path) -> Path:
    """The file of the handler that gives embeddings. Raises CheckError."""
    project = Project(root)
    path = project.find("handlers", HANDLER)
    if path is None:
        what = f'similarity needs the handler "{HANDLER}", which the project does not have'
        raise CheckError([Problem(str(root / "handlers"), 1, what, f"torchserve-dag add handler {HANDLER}")])
    return path


class Similarity:
    """The cosine between the vectors of the two texts, 0 where it is below; of a list of texts, the best."""

    def __init__(self, root: Path) -> None:
        """Loads the handler. Raises CheckError."""
        self._model = Workflow.load(embedding_file(root))

    def check(self, expected: Any) -> str | None:
        return no_texts(expected)

    def score(self, answer: Any, expected: Any) -> float:
        if not text_of(answer).strip():
            return 0.0
        first, *others = map(_vector, self._model([Text(text_of(answer)), *map(Text, texts_in(expected))]))
        return min(1.0, max(0.0, *(_cosine(first, other) for other in others)))

    def close(self) -> None:
        self._model.close()


def _vector(answer: Embedding | Failure) -> list[float]:
    if isinstance(answer, Failure):
        raise ScoreError(f"{HANDLER} gave no vector: {answer.message.rstrip('.')}")
    return answer.embedding


def _cosine(one: list[float], other: list[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / ((math.hypot(*one) * math.hypot(*other)) or 1.0)
