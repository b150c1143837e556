"""A stock TorchServe 0.12.0, in an environment where this package was never installed, for the files of this folder."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from workflow_archiver.workflow_packaging import package_workflow
from workflow_archiver.workflow_packaging_utils import WorkflowExportUtils

from tests import torchserve_specs as specs
from tests.live.conftest import ROOT, run_tool
from tests.tiny_models import write_hub_project
from torchserve_dag.archives.mar import private_tempdir
from torchserve_dag.server import java, ports

STOCK = ROOT / ".venv-stock" / "bin" / "python"
READY_S = 500
HUB = ("transformers_detector", "transformers_classifier", "text_classifier")

# TorchServe 0.12.0 loses an answer now and then, and asks again after the timeout.
PARTS = """
    models: {retry-attempts: 5, timeout-ms: 2000, m: {url: model1.mar}}
    dag: {parts: [seen], seen: [m]}
"""
PARTS_FUNCTIONS = """
    import json
    from shown import shown

    def parts(data, context):
        if data is None: return None
        return [{"parts": shown(row), "one": context.get_request_header(i, "X-One")} for i, row in enumerate(data)]

    def seen(data, context):
        from shown import shown  # again, now that it is in use
        return data and [{"first": json.loads(row["body"]), "one": context.get_request_header(0, "X-One")} for row in data]
"""
SHOWN = """
    def shown(row):
        values = {k: bytes(v).decode("latin-1") if isinstance(v, (bytes, bytearray)) else v for k, v in row.items()}
        return {key: [type(row[key]).__name__, values[key]] for key in sorted(row)}
"""


@dataclass(frozen=True)
class Stock:
    """One server: it runs TorchServe's own workflows at `wfpredict`, and our archives at `predictions`."""

    root: Path
    inference: str
    management: str

    def register(self, name: str, text: str, functions: str = specs.FUNCTIONS, **more: str) -> httpx.Response:
        write_war(self.root, name, specs.with_store(text, self.root / "model_store"), functions, **more)
        return httpx.post(f"{self.management}/workflows", params={"url": f"{name}.war"}, timeout=READY_S)


def write_war(root: Path, name: str, text: str, functions: str, **more: str) -> None:
    sources = root / "sources"
    shutil.rmtree(sources, ignore_errors=True)
    sources.mkdir()
    for file, content in {"spec.yaml": text, "functions.py": functions, **more}.items():
        (sources / file).write_text(textwrap.dedent(content))
    arguments = argparse.Namespace(
        workflow_name=name,
        spec_file=str(sources / "spec.yaml"),
        handler=str(sources / "functions.py"),
        extra_files=",".join(str(sources / file) for file in more) or None,
        export_path=str(root / "workflows"),
        force=True,
    )
    with private_tempdir(sources / "tmp"):
        package_workflow(arguments, WorkflowExportUtils.generate_manifest_json(arguments))


@pytest.fixture(scope="package")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    """Every archive of this project and its `.war`, and a `.war` of TorchServe's own making with our archive of it."""
    if not STOCK.exists():
        pytest.fail("The second environment is not there; run scripts/setup --stock first.", pytrace=False)
    root = tmp_path_factory.mktemp("stock")
    specs.write_store(root / "model_store")
    for folder in ("workflows", "handlers", "tmp"):
        (root / folder).mkdir()
    write_war(root, "parts", PARTS, PARTS_FUNCTIONS, **{"shown.py": SHOWN})
    run_tool(root, "check", "parts")
    run_tool(root, "build", "parts")
    project, hub = tmp_path_factory.mktemp("project"), write_hub_project(tmp_path_factory.mktemp("hub"))
    for name in ("handlers", "workflows", "weights", "photos"):
        (project / name).symlink_to(ROOT / name)
    run_tool(project, "build", "detect_classify", "image_classifier", "yolo_detector")
    run_tool(hub, "build", *HUB)
    for folder in (project / "model_store", project / "workflow_store", hub / "model_store"):
        for path in folder.glob("*.mar"):
            shutil.copy(path, root / "model_store")
    for path in (project / "workflow_store").glob("*.war"):
        shutil.copy(path, root / "workflows")
    store = root / "model_store"
    served = [
        p.name for p in store.glob("*-*.mar") if not p.name.startswith("detect_classify-") or p.stem.endswith(".0")
    ]
    inference, management, metrics, grpc, grpc_management = ports.free(["127.0.0.1"] * 5)
    (root / "config.properties").write_text(
        f"inference_address=http://127.0.0.1:{inference}\nmanagement_address=http://127.0.0.1:{management}\n"
        f"metrics_address=http://127.0.0.1:{metrics}\ngrpc_inference_port={grpc}\ngrpc_management_port={grpc_management}\n"
        "vmargs=-Xmx1g -Djava.util.concurrent.ForkJoinPool.common.parallelism=1\n"
        f"load_models={','.join(served)}\ndisable_token_authorization=true\nenable_model_api=true\n"
    )
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(root),
        "JAVA_HOME": str(java.find()),
        "TEMP": str(root / "tmp"),
        "TMPDIR": str(root / "tmp"),
    }
    command = [STOCK, "-m", "ts.model_server", "--start", "--ncs", "--foreground", "--ts-config", "config.properties"]
    command += ["--model-store", store, "--workflow-store", root / "workflows"]
    with (
        (root / "out.log").open("w") as log,
        subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            server = Stock(root, f"http://127.0.0.1:{inference}", f"http://127.0.0.1:{management}")
            deadline = time.monotonic() + READY_S
            while not all(ready(server, name) for name in served):
                if time.monotonic() > deadline or process.poll() is not None:
                    said = (root / "out.log").read_text()[-3000:]
                    pytest.fail(f"Not ready within {READY_S} s:\n{said}", pytrace=False)
                time.sleep(0.5)
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
