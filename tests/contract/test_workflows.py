"""Every workflow of the project: its answers on real photos, and batches across requests."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator

import pytest

from tests.contract.conftest import ROOT
from torchserve_dag.runtime.data import codec
from torchserve_dag.runtime.messages import Chat, ChatMessage, ContentPart, Failure, ImageUrl, Photo
from torchserve_dag.runtime.workflow import Workflow
from workflows.counted import counts_rightly

Read = Callable[[str], Photo]


@pytest.fixture(scope="module", params=["detect_classify", "detect_classify-2.0"])
def workflow(request: pytest.FixtureRequest) -> Iterator[Workflow]:
    with Workflow.load(ROOT / "workflows" / f"{request.param}.yaml", device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def batched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workflow]:
    """The workflow with a classifier that takes 32 crops at a time, as on a GPU."""
    root = tmp_path_factory.mktemp("batched")
    for name in ("handlers", "weights"):
        (root / name).symlink_to(ROOT / name)
    (root / "workflows").mkdir()
    (root / "workflows" / "detect_classify.py").symlink_to(ROOT / "workflows" / "detect_classify.py")
    text = (ROOT / "workflows" / "detect_classify.yaml").read_text("utf-8")
    changed = text.replace("each: crop}", "each: crop, batch: 32}").replace(
        "yolo_detector}", "yolo_detector, batch: 8}"
    )
    (root / "workflows" / "detect_classify.yaml").write_text(changed, "utf-8")
    with Workflow.load(root / "workflows" / "detect_classify.yaml", device="cpu") as loaded:
        yield loaded


def test_an_answer_is_written_as_json_and_names_what_is_there(workflow: Workflow, photo: Read) -> None:
    (answer,) = workflow([photo("coffee.jpg")])
    body, content_type = codec.encode(answer)

    assert content_type == "application/json"
    assert b"espresso" in body
    assert [one.label for one in answer.objects] == ["cup"]


def test_no_object_is_an_ordinary_answer(workflow: Workflow, photo: Read) -> None:
    (answer,) = workflow([photo("empty.jpg")])

    assert answer.objects == []
    assert answer.summary


def test_requests_together_are_answered_as_each_alone(workflow: Workflow, photo: Read) -> None:
    photos = [photo(name) for name in ("many.jpg", "empty.jpg", "coffee.jpg", "motorcycle.jpg")]
    alone = [workflow([one])[0].summary for one in photos]

    assert [answer.summary for answer in workflow(photos)] == alone


def test_an_unreadable_photo_touches_no_other(workflow: Workflow, photo: Read) -> None:
    good, bad, also_good = workflow([photo("coffee.jpg"), b"no photo", photo("coffee.jpg")])

    assert isinstance(bad, Failure)
    assert bad.status == 415
    assert good.summary == also_good.summary


def test_the_second_version_leaves_unsure_objects_unnamed(photo: Read) -> None:
    with Workflow.load(ROOT / "workflows" / "detect_classify-2.0.yaml", device="cpu") as workflow:
        (answer,) = workflow([photo("motorcycle.jpg")])

    assert [bool(one.names) for one in answer.objects] == [one.score >= 0.4 for one in answer.objects]
    assert "moped" in answer.summary


def test_the_crops_of_all_requests_go_through_the_classifier_together(batched: Workflow, photo: Read) -> None:
    """Eight photos with 30 objects: the crops fill batches that no request could fill alone."""
    photos = [photo("many.jpg"), photo("coffee.jpg"), photo("empty.jpg"), photo("coffee.jpg")] * 2
    before = batched.counts()["classify"]
    answers = batched(photos)
    after = batched.counts()["classify"]
    items = after.items - before.items

    assert items == sum(len(answer.objects) for answer in answers) >= 30
    assert after.batches - before.batches < len([answer for answer in answers if answer.objects])


def test_a_language_model_describes_a_photo() -> None:
    """Its sentence about the cup is right; about fourteen objects it is right, or the plain one is there."""
    with Workflow.load(ROOT / "workflows" / "describe_photo.yaml", device="cpu") as workflow:
        coffee, many = workflow([_chat("coffee.jpg"), _chat("many.jpg")])

    assert counts_rightly(coffee.text, {"cup": 1})
    assert coffee.served_by.startswith("openvino")
    assert counts_rightly(many.text, {"cup": 12, "diningtable": 2}) == (many.served_by != "plain sentence")


def _chat(name: str) -> Chat:
    body = base64.b64encode((ROOT / "photos" / name).read_bytes()).decode()
    photo = ContentPart("image_url", image_url=ImageUrl(f"data:image/jpeg;base64,{body}"))
    return Chat(messages=[ChatMessage("user", [photo])])
