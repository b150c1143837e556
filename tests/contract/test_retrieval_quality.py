"""How well the project's docs are searched, as they were frozen: a floor under what docs/retrieval.md says."""

from __future__ import annotations

import pytest

from tests.retrieval.quality import Measured, Quality
from torchserve_dag.runtime.project.folders import Project

FLOORS = {"vectors": Quality(0.6, 0.44), "text": Quality(0.7, 0.52), "both": Quality(0.725, 0.52)}
"""One question below what was measured, or two: another CPU rounds otherwise."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured(tmp_path_factory.mktemp("frozen"))


@pytest.mark.parametrize("mode", FLOORS)
def test_the_passage_that_answers_is_found(measured: Measured, mode: str) -> None:
    ranks = measured.ranks(mode)
    quality = Quality.of(ranks)

    assert len(ranks) == 40
    assert quality.recall_at_5 >= FLOORS[mode].recall_at_5
    assert quality.mrr >= FLOORS[mode].mrr


def test_the_demos_limit_parts_the_questions_from_those_about_something_else(
    measured: Measured, project: Project
) -> None:
    limit = project.handler("passage_search").value.settings["least_similarity"]

    assert sum(measured.nearest(one.question) < limit for one in measured.questions) <= 1
    assert sum(measured.nearest(question) >= limit for question in measured.irrelevant) <= 1


def test_every_question_can_be_answered(measured: Measured) -> None:
    """Its passage is in the index, whole: a question that nothing answers would only lower the figures."""
    for one in measured.questions:
        passages = measured.passages(one.document)
        assert one.rank(passages), one.question
