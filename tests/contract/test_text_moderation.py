"""The handler `text_moderation`: the filter of words as scikit-learn computes it, and classifiers of the hub."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from torchserve_dag import Failure, Moderation, Text
from torchserve_dag.runtime.models.load import load_handler
from torchserve_dag.runtime.models.stages import Stages
from torchserve_dag.runtime.project.folders import Project

SKLEARN = json.loads((Path(__file__).parents[1] / "data" / "profanity.json").read_text("utf-8"))
"""Texts with the probabilities that the filter's own package gave, by scikit-learn; `origin` says which."""


def set_to(project: Project, folder: Path, **settings: object) -> Stages:
    """The project's handler with other settings."""
    (folder / "handlers").mkdir()
    (folder / "weights").symlink_to(project.weights)
    (folder / "handlers" / "text_moderation.py").symlink_to(project.root / "handlers" / "text_moderation.py")
    file = yaml.safe_load((project.root / "handlers" / "text_moderation.yaml").read_text("utf-8"))
    file["settings"] |= settings
    (folder / "handlers" / "text_moderation.yaml").write_text(yaml.safe_dump(file), "utf-8")
    changed = Project(folder)
    return load_handler(changed, changed.handler("text_moderation"), device="cpu")


def judged(stages: Stages, *texts: str) -> list[Moderation]:
    answers = stages([Text(text) for text in texts])
    assert all(isinstance(answer, Moderation) for answer in answers)
    return answers


@pytest.fixture(scope="module")
def filter_of_words(project: Project) -> Stages:
    return load_handler(project, project.handler("text_moderation"), device="cpu")


def test_the_filter_gives_the_numbers_that_scikit_learn_gave(project: Project, tmp_path: Path) -> None:
    """Each text as one passage."""
    texts, probabilities = zip(*SKLEARN["rows"], strict=True)
    found = judged(set_to(project, tmp_path, max_tokens=1000), *texts)

    assert len(texts) > 20
    assert [one.category_scores["profanity"] for one in found] == pytest.approx(probabilities, rel=1e-9, abs=1e-15)
    assert [one.flagged for one in found] == [one >= 0.5 for one in probabilities]


def test_a_word_is_found_wherever_it_is_in_a_long_text(filter_of_words: Stages) -> None:
    words = ["the", "capital", "of", "france", "is", "paris", "and", "a", "fine", "city"] * 30
    places = random.Random(0).sample(range(len(words)), 20)
    texts = [" ".join([*words[:at], "shit", *words[at:]]) for at in places]
    clean, *found = judged(filter_of_words, " ".join(words), *texts)

    assert not clean.flagged
    assert all(one.flagged for one in found)
    assert found[0].named == "profanity"


@pytest.mark.parametrize("text", ["", " \n", "\u0000", "مرحبا بالعالم", "\ud83d\ude00" * 3, "x" * 100_000])
def test_every_text_has_a_verdict(filter_of_words: Stages, text: str) -> None:
    assert not judged(filter_of_words, text)[0].flagged


def test_a_text_over_the_limit_is_refused(filter_of_words: Stages) -> None:
    (answer,) = filter_of_words([Text("x" * 100_001)])

    assert answer == Failure(422, "The text has 100,001 characters; the limit is 100,000.")


def test_a_threshold_is_a_setting(project: Project, tmp_path: Path) -> None:
    strict = set_to(project, tmp_path, categories={"profanity": {"labels": ["profanity"], "threshold": 0.01}})

    assert judged(strict, "The capital of France is Paris.")[0].categories == {"profanity": True}


def test_a_label_that_the_classifier_has_not_is_refused_at_load(project: Project, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="violence: english-profanity has no label violent; it has profanity"):
        set_to(project, tmp_path, categories={"violence": {"labels": ["violent"]}})


def test_a_hub_classifiers_score_is_that_of_its_likeliest_passage(hub_project: Project) -> None:
    """Of the passages of eight tokens, with the two that begin and end each."""
    stages = load_handler(hub_project, hub_project.handler("text_moderation"), device="cpu")
    folder = hub_project.weights / "text_moderation"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    text = "the coffee was cold and kind . excellent coffee was the cold . and kind was the coffee"
    words = text.split()
    passages = [" ".join(words[at : at + 6]) for at in range(0, len(words) - 3, 3)]
    with torch.inference_mode():
        scores = [model(**tokenizer(one, return_tensors="pt")).logits.softmax(-1)[0, 0].item() for one in passages]
    (found,) = judged(stages, text)

    assert len(set(scores)) > 2
    assert found.category_scores["rude"] == pytest.approx(max(scores), abs=1e-5)
