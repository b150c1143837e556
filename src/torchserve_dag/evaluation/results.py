"""The result of an evaluation, kept in `evaluations/NAME-VERSION.json` with what it holds for."""

from __future__ import annotations

import datetime as dt
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from torchserve_dag.archives import atomic
from torchserve_dag.archives.archive import Archive
from torchserve_dag.evaluation.data_set import DataSet
from torchserve_dag.evaluation.run import EvaluationRun, FailedItem
from torchserve_dag.evaluation.specs import ScoreSpec
from torchserve_dag.releases import intervals
from torchserve_dag.releases.experiment import Difference
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.source import CheckError, Problem

FOLDER = "evaluations"


@dataclass(frozen=True, slots=True)
class Score:
    """A scorer's mean over all items."""

    mean: float
    low: float
    high: float
    """The bounds of the 95 % confidence interval."""
    scorer: str
    """As `--score` has it."""
    origin: str = ""
    """A hash of what of the project computes it: a function's file, the handler of embeddings."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A version's scores on a data set."""

    model: str
    version: str
    archive: str
    """The hash of the archive's content, as `status` shows it."""
    data: str
    """The file, relative to the project."""
    data_hash: str
    """Of the file, and of the files that its lines name."""
    date: str
    """When, in UTC."""
    items: int
    errors: int
    """Items that failed; each scores 0."""
    scores: dict[str, Score]
    failed: list[FailedItem]
    """The first of the items that failed."""

    @classmethod
    def of(
        cls, root: Path, archive: Archive, data: DataSet, specs: Sequence[ScoreSpec], run: EvaluationRun
    ) -> Evaluation:
        """Raises OSError, CheckError."""
        scores = {spec.name: _score(run.scores[spec.name], spec, root) for spec in specs}
        path = Path(os.path.relpath(data.path.resolve(), root.resolve())).as_posix()
        now = f"{dt.datetime.now(dt.timezone.utc):%Y-%m-%d %H:%M:%S}"
        what = (archive.name, archive.version, archive.hash)
        return cls(*what, path, data.hash, now, data.items, run.errors, scores, run.failed)

    @property
    def name(self) -> str:
        return f"{self.model}/{self.version}"


def path_of(root: Path, model: str, version: str) -> Path:
    """Where a version's evaluation is kept."""
    return root / FOLDER / f"{model}-{version}.json"


def keep(root: Path, evaluation: Evaluation) -> Path:
    """Write it over the version's last one. Raises OSError."""
    path = path_of(root, evaluation.model, evaluation.version)
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(plain.flatten(evaluation), indent=2, ensure_ascii=False, allow_nan=False)
    atomic.write_text(path, f"{text}\n")
    return path


def kept(root: Path, model: str, version: str) -> Evaluation | None:
    """A version's last evaluation; None if there is none. Raises CheckError for a file that is none."""
    path = path_of(root, model, version)
    try:
        return plain.build(Evaluation, json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, plain.WrongDataError) as error:
        raise CheckError(
            [Problem(str(path), 1, f"it is no evaluation: {error}", "delete it, and evaluate again")]
        ) from None


def differences(first: EvaluationRun, second: EvaluationRun) -> list[Difference]:
    """The second version's mean scores minus the first's, on the same items, with 95 % intervals."""
    return [_difference(name, first.scores[name], second.scores[name]) for name in first.scores]


def _difference(what: str, first: Sequence[float], second: Sequence[float]) -> Difference:
    pairs = [b - a for a, b in zip(first, second, strict=True)]
    mean, size = fmean(pairs), len(pairs)
    spread = fmean((one - mean) ** 2 for one in pairs)
    interval = _within(intervals.paired_difference(first, second), -1.0, 1.0)
    return Difference.between(what, (fmean(first), fmean(second)), interval, (size, size), spread, size)


def _score(scores: Sequence[float], spec: ScoreSpec, root: Path) -> Score:
    binary = {*scores} <= {0.0, 1.0}
    interval = intervals.share(int(sum(scores)), len(scores)) if binary else intervals.mean(scores)
    return Score(fmean(scores), *_within(interval, 0.0, 1.0), spec.text, spec.origin(root))


def _within(interval: intervals.Interval, low: float, high: float) -> intervals.Interval:
    return max(low, interval[0]), min(high, interval[1])
