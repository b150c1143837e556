"""The main job on a real TorchServe: a photo's objects found, cropped and named, over REST and gRPC."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.live.conftest import ROOT, Serving, run_tool
from torchserve_dag.clients import Client, GrpcClient, RestClient
from torchserve_dag.runtime.messages import Labels, Objects
from torchserve_dag.runtime.workflow import Workflow

Photo = Callable[[str], bytes]


@pytest.fixture(params=["rest", "grpc"])
def serving_client(request: pytest.FixtureRequest, rest: RestClient, grpc: GrpcClient) -> Client:
    return rest if request.param == "rest" else grpc


def test_the_coffee_is_a_cup_with_espresso_in_it(serving_client: Client, photo: Photo) -> None:
    answer = serving_client.predict("detect_classify", photo("coffee.jpg"), "1.0")

    assert [(o["label"], o["names"][0]["name"]) for o in answer["objects"]] == [("cup", "espresso")]
    assert answer["summary"] == "1 cup"


def test_the_motorcycle_is_a_motorbike_that_is_a_moped(serving_client: Client, photo: Photo) -> None:
    best = serving_client.predict("detect_classify", photo("motorcycle.jpg"), "1.0")["objects"][0]

    assert (best["label"], best["names"][0]["name"]) == ("motorbike", "moped")


def test_a_photo_without_objects_has_an_ordinary_answer(serving_client: Client, photo: Photo) -> None:
    assert serving_client.predict("detect_classify", photo("empty.jpg"), "1.0") == {
        "objects": [],
        "summary": "nothing found",
    }


def test_served_answers_are_those_of_the_python_object(serving_client: Client, photo: Photo) -> None:
    names = ["coffee.jpg", "many.jpg", "chelsea.jpg", "motorcycle.jpg"]
    with Workflow.load(ROOT / "workflows/detect_classify.yaml") as workflow:
        here = [answer.summary for answer in workflow([photo(name) for name in names])]
    with ThreadPoolExecutor(len(names)) as threads:
        there = list(
            threads.map(lambda n: serving_client.predict("detect_classify", photo(n), "1.0")["summary"], names)
        )

    assert there == here


def test_versions_of_the_workflow_stand_side_by_side(serving_client: Client, photo: Photo) -> None:
    one, two = (serving_client.predict("detect_classify", photo("coffee.jpg"), version) for version in ("1.0", "2.0"))

    assert one["summary"] == "1 cup"
    assert two["summary"] == "The photo shows a cup (espresso) in the middle."


def test_versions_of_the_classifier_differ_in_their_scores_only(serving_client: Client, photo: Photo) -> None:
    one, two = (
        serving_client.predict("image_classifier", photo("coffee.jpg"), version, answer=Labels)
        for version in ("1.0", "2.0")
    )

    assert one.best.name == two.best.name == "espresso"
    assert one.best.score != two.best.score


def test_a_handler_is_a_model_of_its_own(serving_client: Client, photo: Photo) -> None:
    found = serving_client.predict("yolo_detector", photo("coffee.jpg"), answer=Objects)

    assert [one.label for one in found.objects] == ["cup"]


def test_a_stream_from_a_model_that_does_not_stream_is_one_chunk(serving_client: Client, photo: Photo) -> None:
    """And the worker lives on: TorchServe ends one that gives a stream a whole answer."""
    for body, has in ((photo("coffee.jpg"), b"cup"), (photo("empty.jpg"), b"objects")):
        chunks = list(serving_client.stream("yolo_detector", body))
        assert len(chunks) == 1
        assert has in chunks[0]


def test_each_version_has_workers_of_its_own(rest: RestClient) -> None:
    models = {model.name: model for model in rest.models()}
    workers = [worker.id for model in models.values() for version in model.versions for worker in version.workers]

    assert {v.version for v in models["detect_classify"].versions} == {"1.0", "2.0"}
    assert {v.version for v in models["image_classifier"].versions} == {"1.0", "2.0"}
    assert len(workers) == len(set(workers)) == sum(len(model.versions) for model in models.values()), "one for each"


def test_the_default_version_can_be_set(serving: Serving, serving_client: Client, photo: Photo) -> None:
    """The newest is the default until another is set."""
    summaries = []
    for version in ("1.0", "2.0"):
        run_tool(serving.root, "default", "detect_classify", version)
        summaries.append(serving_client.predict("detect_classify", photo("coffee.jpg"))["summary"])

    assert summaries == ["1 cup", "The photo shows a cup (espresso) in the middle."]


def test_a_running_server_tells_why_a_model_is_running(serving: Serving, serving_client: Client) -> None:
    served = serving_client.describe("detect_classify", "2.0")["customizedMetadata"]
    shown = json.loads(run_tool(serving.root, "status", "detect_classify/2.0", "--json"))

    assert set(served["card"]["handlers"]) == {"yolo_detector", "image_classifier"}
    assert all(one["weights"][0]["sha256"] for one in served["card"]["handlers"].values())
    assert {"commit", "packages", "weights"} <= set(served["inputs"])
    assert served["inputs"]["packages"]["torch"].startswith("2.13.0")
    assert served["graph"].startswith("flowchart")
    assert json.dumps(served["card"]) in json.dumps(shown)


def test_a_call_on_the_command_line_prints_the_answer(serving: Serving) -> None:
    for protocol in ([], ["--grpc"]):
        printed = run_tool(serving.root, "call", "detect_classify/1.0", "photos/coffee.jpg", "--json", *protocol)
        assert json.loads(printed)["summary"] == "1 cup"


def test_the_example_of_the_documentation_of_served_models_runs(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "served.md").read_text("utf-8"), re.DOTALL)
    for name in ("handlers", "weights"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows" / "detect_classify.py").symlink_to(ROOT / "workflows" / "detect_classify.py")
    path = tmp_path / "workflows" / "shared_classifier.yaml"
    path.write_text(example.replace("127.0.0.1:7070", serving.addresses.grpc_inference))
    monkeypatch.chdir(serving.root)
    with Workflow.load(path) as workflow:
        (answer,) = workflow([(ROOT / "photos" / "coffee.jpg").read_bytes()])

    assert [(one.label, one.names[0].name) for one in answer.objects] == [("cup", "espresso")]
