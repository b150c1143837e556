"""Every handler keeps the contract: what one item is answered does not depend on its neighbours."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageOps

from torchserve_dag.runtime.data import codec, plain
from torchserve_dag.runtime.messages import Chat, Failure, Labels, Moderation, Objects, Photo, Text
from torchserve_dag.runtime.models.load import load_handler
from torchserve_dag.runtime.models.stages import Stages
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.workflow import Workflow

HANDLERS = [
    "yolo_detector",
    "image_classifier",
    "image_classifier/2.0",
    "transformers_detector",
    "transformers_classifier",
    "text_classifier",
    "text_moderation",
]
OF_PHOTOS = HANDLERS[:-2]
ELSEWHERE = [
    "hosted_generation/1.0",
    "large_generation/1.0",
    "passage_search/1.0",
    "text_embedding/1.0",
    "text_generation/1.0",
]
"""Tested in unit/test_text_embedding.py and test_passage_index.py, in engines/ and below, and in
unit/test_chat_with_fallback.py."""

Load = Callable[[str], Stages]
Read = Callable[[str], Photo]


def test_every_handler_of_the_project_is_tested_here(project: Project) -> None:
    """A new handler is added to the list above."""
    files = [project.read_handler(path).value for path in project.files("handlers")]

    assert sorted(f"{f.name}/{f.version}" for f in files) == sorted(
        [*ELSEWHERE, *(name if "/" in name else f"{name}/1.0" for name in HANDLERS)]
    )


def test_the_language_model_of_the_demo_answers_its_question(project: Project) -> None:
    """Of its quantised weights, with the default engine."""
    question = Chat.of("What is the capital of France?", max_tokens=16, temperature=0)
    with Workflow.load(project.root / "handlers/text_generation.yaml") as model:
        (chunks,) = model([question])

    assert "".join(chunk.text for chunk in chunks) == "The capital of France is Paris."
    assert chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize("name", HANDLERS)
def test_the_example_is_answered_in_json(load: Load, name: str) -> None:
    """A handler answers its own example with a message that a client can read back."""
    stages = load(name)
    (answer,) = stages([stages.handler.example()])
    body, content_type = codec.encode(answer)

    assert content_type == "application/json"
    assert plain.build(type(answer), json.loads(body)) == answer


@pytest.mark.parametrize("name", HANDLERS)
def test_a_batch_is_answered_as_its_items_alone(load: Load, photo: Read, name: str) -> None:
    """Photos of several sizes, or texts of several lengths, in one batch: to 1e-4 what each is answered alone."""
    stages = load(name)
    items = _items(name, photo)
    alone = [stages([item])[0] for item in items]

    assert not any(isinstance(answer, Failure) for answer in alone)
    assert _same(stages(items), alone)


@pytest.mark.parametrize("name", HANDLERS)
def test_stages_run_side_by_side(load: Load, photo: Read, name: str) -> None:
    """Eight threads at once get what one thread gets: no stage writes what another reads."""
    stages = load(name)
    items = _items(name, photo)
    alone = [stages([item])[0] for item in items]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda item: stages([item])[0], items * 4))

    assert _same(answers, alone * 4)


@pytest.mark.parametrize("name", HANDLERS)
def test_one_bad_item_touches_no_other(load: Load, photo: Read, name: str) -> None:
    """An item that raises, here one that is no message at all, ends alone; its neighbours are answered."""
    stages = load(name)
    good = _items(name, photo)[:2]
    first, bad, last = stages([good[0], object(), good[1]])

    assert isinstance(bad, Failure)
    assert _same([first, last], stages(good))


@pytest.mark.parametrize("name", ["transformers_detector", "transformers_classifier"])
def test_a_photo_like_a_thread_is_refused(load: Load, photo: Read, name: str) -> None:
    """A photo that no processor can make sense of is 422, and says what to send instead."""
    bad, good = load(name)([Photo(Image.new("RGB", (2000, 2))), photo("coffee.jpg")])

    assert isinstance(bad, Failure)
    assert (bad.status, not isinstance(good, Failure)) == (422, True)
    assert bad.message == "The photo is 2000 x 2; send one whose longer side is at most 20 times its shorter."


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (5, 4000)])
@pytest.mark.parametrize("name", ["yolo_detector", "image_classifier"])
def test_a_photo_of_any_size_is_answered(load: Load, name: str, size: tuple[int, int]) -> None:
    """A crop may be a pixel high."""
    (answer,) = load(name)([Photo(Image.new("RGB", size, "white"))])

    assert not isinstance(answer, Failure)


def test_a_long_text_is_refused_with_its_length(load: Load) -> None:
    """A text over the limit is 422 with both numbers; the text beside it is answered."""
    bad, good = load("text_classifier")([Text("coffee " * 40), Text("the coffee was cold")])

    assert bad == Failure(422, "The text has 42 tokens; the limit is 16, so send it in shorter parts.")
    assert isinstance(good, Labels)


def test_a_blank_text_is_refused(load: Load) -> None:
    """A text of spaces is 422, not a verdict on nothing."""
    (answer,) = load("text_classifier")([Text(" \n")])

    assert answer == Failure(422, "The text is blank; send at least a word.")


def test_more_tokens_than_the_model_takes_is_refused_at_load(hub_project: Project, tmp_path: Path) -> None:
    """`max_tokens` over the model's own limit fails when the handler loads, not at the first long text."""
    project = _with(hub_project, tmp_path, "text_classifier", max_tokens=512)

    with pytest.raises(ValueError, match=r"max_tokens is 512, and .* takes 32 at most"):
        load_handler(project, project.handler("text_classifier"))


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("transformers_classifier", "transformers_detector"),
        ("transformers_detector", "transformers_classifier"),
        ("text_classifier", "transformers_classifier"),
    ],
)
def test_a_model_of_another_task_is_refused_at_load(
    hub_project: Project, tmp_path: Path, name: str, model: str
) -> None:
    """The library would give a model a random head and answer at random, or has no such head at all."""
    project = _with(hub_project, tmp_path, name, model=model)

    with pytest.raises((ValueError, OSError)):
        load_handler(project, project.handler(name))


def test_a_model_without_its_head_is_refused_at_load(hub_project: Project, tmp_path: Path) -> None:
    """A model that was pretrained only, and never for this task, is named as such."""
    from transformers import DistilBertForSequenceClassification

    project = _with(hub_project, tmp_path, "text_classifier", model="headless")
    shutil.copytree(hub_project.weights / "text_classifier", project.weights / "headless")
    trained = DistilBertForSequenceClassification.from_pretrained(project.weights / "headless")
    trained.distilbert.save_pretrained(project.weights / "headless")

    with pytest.raises(ValueError, match=r"headless is not trained to classify texts: it lacks classifier\.bias"):
        load_handler(project, project.handler("text_classifier"))


def test_two_views_make_the_mirror_image_no_matter(load: Load, photo: Read) -> None:
    """Version 2.0 says the same of a photo and of its mirror image; version 1.0 does not."""
    cat = photo("chelsea.jpg")
    mirrored = Photo(ImageOps.mirror(cat.image))
    one, two = load("image_classifier"), load("image_classifier/2.0")

    assert _same(two([cat]), two([mirrored]), 1e-3)
    assert not _same(one([cat]), one([mirrored]), 1e-3)


def test_the_cards_and_the_script_name_the_same_weights(project: Project) -> None:
    """Each sha256 of the cards is that of the file, or folder, which `scripts/weights` makes and checks."""
    script = runpy.run_path(str(project.root / "scripts/weights"))
    made = {
        file: sha256 for package in script["PACKAGES"] + script["LANGUAGE"] for file, sha256 in package.makes.items()
    }
    weights = [w for path in project.files("handlers") for w in project.read_handler(path).value.card.weights]
    known = [w for w in weights if w.sha256]

    assert len(known) >= 4
    assert [w.file for w in known if w.sha256 != (made.get(w.file) or _of_folder(w.file, made))] == []


def _of_folder(folder: str, made: dict[str, str]) -> str:
    """The sha256 of a folder of weights whose files are made."""
    inside = {file.removeprefix(f"{folder}/"): sha256 for file, sha256 in made.items() if file.startswith(f"{folder}/")}
    lines = sorted(f"{sha256}  {file}\n".encode() for file, sha256 in inside.items())
    return hashlib.sha256(b"".join(lines)).hexdigest()


def _items(name: str, photo: Read) -> list[Any]:
    if name in OF_PHOTOS:
        return [photo(file) for file in ("coffee.jpg", "motorcycle.jpg", "chelsea.jpg", "coffee.jpg")]
    return [Text(text) for text in ("kind", "the coffee was excellent and kind .", "the coffee was cold", "kind .")]


def _with(hub_project: Project, folder: Path, name: str, **settings: object) -> Project:
    """The hub project again, in `folder`, with other settings for one handler."""
    shutil.copytree(hub_project.root / "handlers", folder / "handlers")
    shutil.copytree(hub_project.weights, folder / "weights")
    path = folder / "handlers" / f"{name}.yaml"
    file = yaml.safe_load(path.read_text("utf-8"))
    file["settings"] |= settings
    path.write_text(yaml.safe_dump(file), "utf-8")
    return Project(folder)


def _same(some: list[Any], others: list[Any], within: float = 1e-4) -> bool:
    """The same answers, in the same order: scores to `within`, boxes to a hundred times that, in pixels."""
    return len(some) == len(others) and all(_alike(a, b, within) for a, b in zip(some, others, strict=True))


def _alike(a: Any, b: Any, within: float) -> bool:
    if isinstance(a, Labels) and isinstance(b, Labels):
        scores = {label.name: label.score for label in b.labels}
        return all(abs(label.score - scores.get(label.name, 9)) <= within for label in a.labels)
    if isinstance(a, Moderation) and isinstance(b, Moderation):
        scores = b.category_scores
        return all(abs(score - scores.get(name, 9)) <= within for name, score in a.category_scores.items())
    if isinstance(a, Objects) and isinstance(b, Objects) and len(a.objects) == len(b.objects):
        return all(
            x.label == y.label
            and abs(x.score - y.score) <= within
            and max(abs(p - q) for p, q in zip(_corners(x), _corners(y), strict=True)) <= 100 * within
            for x, y in zip(a.objects, b.objects, strict=True)
        )
    return False


def _corners(found: Any) -> tuple[float, ...]:
    return found.box.left, found.box.top, found.box.right, found.box.bottom
