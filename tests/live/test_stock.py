"""Archives on a stock TorchServe 0.12.0, in an environment where this package was never installed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.live.conftest import ROOT, run_tool
from tests.tiny_models import write_hub_project
from torchserve_dag.server import java, ports

STOCK = ROOT / ".venv-stock" / "bin" / "python"
READY_S = 150


@dataclass(frozen=True)
class Stock:
    inference: str
    management: str


@pytest.fixture(scope="module")
def stock(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    """Every archive of this project and its `.war`, in a server that knows nothing of it."""
    if not STOCK.exists():
        pytest.fail("The second environment is not there; run scripts/setup --stock first.", pytrace=False)
    home = tmp_path_factory.mktemp("stock")
    store, hub = home / "store", write_hub_project(home / "hub")
    store.mkdir()
    run_tool(hub, "build", "transformers_detector", "transformers_classifier", "text_classifier")
    for folder in (project / "model_store", project / "workflow_store", hub / "model_store"):
        for path in [*folder.glob("*.mar"), *folder.glob("*.war")]:
            shutil.copy(path, store)
    served = [p.name for p in store.glob("*.mar") if not p.name.startswith("detect_classify-") or p.stem.endswith(".0")]
    inference, management, metrics, grpc, grpc_management = ports.free(["127.0.0.1"] * 5)
    (home / "config.properties").write_text(
        f"inference_address=http://127.0.0.1:{inference}\nmanagement_address=http://127.0.0.1:{management}\n"
        f"metrics_address=http://127.0.0.1:{metrics}\ngrpc_inference_port={grpc}\ngrpc_management_port={grpc_management}\n"
        "vmargs=-Xmx1g -Djava.util.concurrent.ForkJoinPool.common.parallelism=1\n"
        f"load_models={','.join(served)}\ndisable_token_authorization=true\nenable_model_api=true\n"
    )
    (home / "tmp").mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "JAVA_HOME": str(java.find()),
        "TEMP": str(home / "tmp"),
        "TMPDIR": str(home / "tmp"),
    }
    command = [STOCK, "-m", "ts.model_server", "--start", "--ncs", "--foreground", "--ts-config", "config.properties"]
    command += ["--model-store", store, "--workflow-store", store]
    with (
        (home / "out.log").open("w") as log,
        subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            server = Stock(f"http://127.0.0.1:{inference}", f"http://127.0.0.1:{management}")
            wait(lambda: all(ready(server, name) for name in served), home / "out.log")
            yield server
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def ready(server: Stock, archive: str) -> bool:
    name, _, version = archive.removesuffix(".mar").rpartition("-")
    try:
        answer = httpx.get(f"{server.management}/models/{name}/{version}", timeout=10)
    except httpx.TransportError:
        return False
    return answer.status_code == 200 and all(worker["status"] == "READY" for worker in answer.json()[0]["workers"])


def wait(until: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while not until():
        if time.monotonic() > deadline:
            pytest.fail(f"Not ready within {READY_S} s:\n{log.read_text()[-3000:]}", pytrace=False)
        time.sleep(1)


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
