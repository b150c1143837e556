"""Measures retrieval on the frozen docs: `python -m tests.retrieval.quality` prints recall@5 and MRR of each mode.

A question is answered by the passage of a known document that holds known words. Documents and questions stay as they
are, so that figures can be compared.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from torchserve_dag import Embedding, Passage, PassageIndex, Query, SearchSettings, Text, Workflow
from torchserve_dag.retrieval.update import update
from torchserve_dag.runtime.retrieval.folder import IndexFolder
from torchserve_dag.runtime.retrieval.settings import Mode
from torchserve_dag.runtime.retrieval.version import PLACE, IndexVersion

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEPTH = 10
"""Ranks that count towards MRR."""
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, slots=True)
class Question:
    question: str
    document: str
    holds: str
    """Words of the passage that answers it."""

    def rank(self, passages: Sequence[Passage]) -> int | None:
        """The rank of the passage that answers it, from 1; None where it was not found."""
        words = "".join(self.holds.split())
        for rank, passage in enumerate(passages, 1):
            if passage.document == self.document and words in "".join(passage.text.split()):
                return rank
        return None


@dataclass(frozen=True, slots=True)
class Quality:
    """Of all questions."""

    recall_at_5: float
    """The part of the questions whose passage is among the first five."""
    mrr: float
    """The mean of 1 / rank, 0 where the passage is not among the first ten."""

    @classmethod
    def of(cls, ranks: Sequence[int | None]) -> Quality:
        found = [rank for rank in ranks if rank]
        return cls(sum(rank <= 5 for rank in found) / len(ranks), sum(1 / rank for rank in found) / len(ranks))


class Measured:
    """The frozen docs, indexed in a project of their own; and the questions, with their vectors."""

    def __init__(self, root: Path) -> None:
        for name in ("handlers", "weights"):
            (root / name).symlink_to(ROOT / name)
        self.root = root
        self.report = update(root, HERE / "docs", "docs")
        lines = (HERE / "questions.jsonl").read_text("utf-8").splitlines()
        self.questions = [Question(**json.loads(line)) for line in lines]
        self.irrelevant = (HERE / "irrelevant.txt").read_text("utf-8").splitlines()
        with Workflow.load(ROOT / "handlers" / "text_embedding.yaml") as model:
            texts = [*(one.question for one in self.questions), *self.irrelevant]
            self._vectors: dict[str, Embedding] = dict(zip(texts, model([Text(text) for text in texts]), strict=True))

    def search(self, question: str, mode: Mode, least: float = -1.0) -> list[Passage]:
        index = PassageIndex(self.root, SearchSettings("docs", DEPTH, least, mode))
        return index.search(Query(question, self._vectors[question])).passages

    def passages(self, document: str) -> list[Passage]:
        """All that a document was split into."""
        folder = IndexFolder.of(self.root, "docs")
        rows = IndexVersion.open(folder, self.report.version).table.search().limit(self.report.passages).to_list()
        return [
            Passage(**{name: row[name] for name in PLACE}, similarity=0.0)
            for row in rows
            if row["document"] == document
        ]

    def ranks(self, mode: Mode) -> list[int | None]:
        return [one.rank(self.search(one.question, mode)) for one in self.questions]

    def nearest(self, question: str) -> float:
        """How near the index comes to a question."""
        return self.search(question, "vectors")[0].similarity


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        measured = Measured(Path(folder))
        lines = [f"{measured.report.documents} documents, {measured.report.passages} passages"]
        for mode in MODES:
            ranks = measured.ranks(mode)
            quality = Quality.of(ranks)
            missed = [
                one.question for one, rank in zip(measured.questions, ranks, strict=True) if rank is None or rank > 5
            ]
            lines.append(f"{mode}: recall@5 {quality.recall_at_5:.3f}, MRR {quality.mrr:.3f}")
            lines += [f"  not among the first five: {question}" for question in missed]
        asked = sorted(measured.nearest(one.question) for one in measured.questions)
        others = sorted(measured.nearest(question) for question in measured.irrelevant)
        lines.append(f"similarity of the nearest passage: questions {asked[0]:.2f} to {asked[-1]:.2f}")
        lines.append(f"  questions about something else {others[0]:.2f} to {others[-1]:.2f}")
        sys.stdout.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main()
