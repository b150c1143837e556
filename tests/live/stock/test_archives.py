"""Archives on a stock TorchServe 0.12.0, in an environment where this package was never installed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import httpx
import pytest

from tests.live.stock.conftest import READY_S, STOCK, Stock


def test_the_second_environment_has_no_package_of_ours(stock: Stock) -> None:
    found = subprocess.run([STOCK, "-c", "import torchserve_dag"], capture_output=True, text=True, check=False)

    assert "ModuleNotFoundError" in found.stderr


def test_the_workflow_archive_serves_there(stock: Stock, photo: Callable[[str], bytes]) -> None:
    answer = post(f"{stock.inference}/predictions/detect_classify/1.0", photo("coffee.jpg"))

    assert answer["objects"][0]["names"][0]["name"] == "espresso"


@pytest.mark.parametrize(
    ("name", "body", "has"),
    [
        ("yolo_detector/1.0", "coffee.jpg", "objects"),
        ("image_classifier/1.0", "coffee.jpg", "labels"),
        ("image_classifier/2.0", "coffee.jpg", "labels"),
        ("transformers_detector/1.0", "coffee.jpg", "objects"),
        ("transformers_classifier/1.0", "coffee.jpg", "labels"),
        ("text_classifier/1.0", b"the coffee was excellent", "labels"),
    ],
)
def test_each_handlers_archive_serves_there(
    stock: Stock, photo: Callable[[str], bytes], name: str, body: str | bytes, has: str
) -> None:
    content = photo(body) if isinstance(body, str) else body

    assert has in post(f"{stock.inference}/predictions/{name}", content)


def test_the_war_runs_on_torchserves_own_engine(stock: Stock, photo: Callable[[str], bytes]) -> None:
    """The same answers as the workflow archive; a failure is a body with status 200, which is all it can say."""
    registered = httpx.post(f"{stock.management}/workflows?url=detect_classify-1.0.war", timeout=READY_S)
    assert registered.status_code == 200, registered.text

    for name in ("coffee.jpg", "many.jpg", "empty.jpg"):
        native = post(f"{stock.inference}/wfpredict/detect_classify", photo(name))
        ours = post(f"{stock.inference}/predictions/detect_classify/1.0", photo(name))
        assert native["summary"] == ours["summary"]

    assert post(f"{stock.inference}/wfpredict/detect_classify", b"no photo")["code"] == 415


def post(url: str, body: bytes) -> dict[str, object]:
    answer = httpx.post(url, content=body, headers={"Content-Type": "application/octet-stream"}, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = json.loads(answer.content)
    return found
