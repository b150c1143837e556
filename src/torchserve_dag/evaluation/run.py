"""A data set through a workflow: each answer scored, items that fail counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torchserve_dag.evaluation.answers import readable
from torchserve_dag.evaluation.data_set import DataItem, DataSet
from torchserve_dag.evaluation.inputs import message_of
from torchserve_dag.evaluation.scorers import ScoreError, Scorer
from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.workflow import Workflow

MOST_NAMED = 20
"""So many of the items that failed are named; the others are counted."""
LONGEST_WHY = 500


@dataclass(frozen=True, slots=True)
class FailedItem:
    """An item without an answer, or whose answer could not be scored."""

    id: str
    line: int
    why: str


@dataclass(slots=True)
class EvaluationRun:
    """What came of a data set."""

    scores: dict[str, list[float]]
    """Of each scorer, the score of each item, in the data's order; 0 for one that failed."""
    errors: int = 0
    """Items that failed."""
    failed: list[FailedItem] = field(default_factory=list)
    """The first of them."""


def evaluate(
    workflow: Workflow,
    data: DataSet,
    scorers: Mapping[str, Scorer],
    progress: Callable[[], object] = lambda: None,
) -> EvaluationRun:
    """Run all items, several at once as the workflow batches them; `progress` is called after each.

    Raises OSError if a file of the data cannot be read any more.
    """
    run = EvaluationRun({name: [] for name in scorers})
    messages = (message_of(workflow.graph.request, item.input) for item in data)
    for item, answer in zip(data, workflow.map(messages), strict=True):
        why = _score(run, scorers, item, answer, streams=workflow.graph.streams)
        if why:
            run.errors += 1
            if len(run.failed) < MOST_NAMED:
                run.failed.append(FailedItem(item.id, item.line, why[:LONGEST_WHY]))
        progress()
    return run


def _score(
    run: EvaluationRun, scorers: Mapping[str, Scorer], item: DataItem, answer: Any, *, streams: bool
) -> str | None:
    """Add an answer's scores; why it failed, if it did."""
    why = _failure(answer) if isinstance(answer, Failure) else None
    found = None if why else readable(answer, streams=streams)
    for name, scorer in scorers.items():
        score = 0.0
        if not isinstance(answer, Failure):
            try:
                score = scorer.score(found, item.expected)
            except ScoreError as error:
                why = why or f"{name}: {error}."
        run.scores[name].append(score)
    return why


def _failure(failure: Failure) -> str:
    where = f" (at the node {failure.node})" if failure.node else ""
    return f"{failure.status} {failure.message}{where}"
