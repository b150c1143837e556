"""What `--score` names: `exact`, `recall@5:documents`, or a function of the project's, `scores.py:polite`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.evaluation.function import FunctionScorer
from torchserve_dag.evaluation.scorers import Contains, Exact, Json, OfField, Recall, Scorer
from torchserve_dag.evaluation.similarity import Similarity, embedding_file
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.source import CheckError, Problem
from torchserve_dag.runtime.project.weight_files import sha256

_BUILT_IN = re.compile(r"(?P<scorer>[a-z_]+)(?:@(?P<first>[1-9]\d{0,5}))?(?::(?P<field>\w+(?:\.\w+)*))?")
_FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<function>\w+)")

SIMPLE: dict[str, Callable[[], Scorer]] = {"exact": Exact, "contains": Contains, "json": Json}
SIMILARITY, RECALL = "similarity", "recall"
KNOWN = [*SIMPLE, SIMILARITY, RECALL]


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """A scorer by its name."""

    text: str
    """As `--score` has it; a function's file is relative to the project."""
    scorer: str
    """The name of a scorer of this package, or of the function."""
    first: int = 0
    """Of recall: how many elements of the answer count."""
    field: str = ""
    """The answer's field that is scored; empty for the whole answer."""
    file: str = ""
    """Of a function: its file."""

    @property
    def name(self) -> str:
        """What the score is called."""
        return self.scorer if self.file else self.text

    @classmethod
    def read(cls, text: str) -> ScoreSpec:
        """Raises ValueError that says what to write instead."""
        if function := _FUNCTION.fullmatch(text):
            return cls(text, function["function"], file=function["file"])
        match = _BUILT_IN.fullmatch(text)
        if not match or match["scorer"] not in KNOWN:
            hint = plain.did_you_mean(text.partition("@")[0].partition(":")[0], KNOWN)
            raise ValueError(f'"{text}" is no scorer; {hint}, or write FILE.py:FUNCTION')
        if (match["scorer"] == RECALL) != (match["first"] is not None):
            what = "only recall has an @" if match["first"] else "recall@5 is of the first 5 elements of an answer"
            raise ValueError(f'"{text}" is no scorer: {what}')
        return cls(text, match["scorer"], int(match["first"] or 0), match["field"] or "")

    def in_project(self, root: Path) -> ScoreSpec:
        """The same, of a function whose file was named relative to the working directory. Raises ValueError."""
        if not self.file:
            return self
        file = Path(os.path.relpath(Path(self.file).resolve(), root.resolve())).as_posix()
        if file.startswith(os.pardir):
            raise ValueError(f"{self.file} is not in the project {root}, where functions that score are")
        return ScoreSpec(f"{file}:{self.scorer}", self.scorer, file=file)

    def origin(self, root: Path) -> str:
        """A short hash of what of the project computes the score; empty for nothing. Raises OSError, CheckError."""
        if self.file:
            return sha256(root / self.file)[:12]
        return sha256(embedding_file(root))[:12] if self.scorer == SIMILARITY else ""

    def load(self, root: Path, closing: ExitStack) -> Scorer:
        """The scorer; `closing` ends what it holds. Raises CheckError."""
        if self.file:
            if not (root / self.file).is_file():
                raise CheckError([Problem(str(root / self.file), 1, "there is no such file")])
            return FunctionScorer(root, root / self.file, self.scorer)
        scorer: Scorer
        if self.scorer == SIMILARITY:
            scorer = similarity = Similarity(root)
            closing.callback(similarity.close)
        elif self.scorer == RECALL:
            scorer = Recall(self.first)
        else:
            scorer = SIMPLE[self.scorer]()
        return OfField(scorer, self.field) if self.field else scorer


def read_specs(texts: Sequence[str], root: Path) -> list[ScoreSpec]:
    """What several `--score` name, relative to the working directory. Raises ValueError, also for a name twice."""
    specs = [ScoreSpec.read(text).in_project(root) for text in texts]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two scores are called {name}: leave one out")
    return specs
