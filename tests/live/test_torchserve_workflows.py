"""A stock TorchServe 0.12.0 is asked what it makes of its own workflows, and ours makes the same of them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from workflow_archiver.workflow_packaging import package_workflow
from workflow_archiver.workflow_packaging_utils import WorkflowExportUtils

from tests import torchserve_specs as specs
from tests.live.conftest import run_tool
from tests.live.test_stock import READY_S, STOCK
from torchserve_dag.archives.mar import private_tempdir
from torchserve_dag.runtime.workflow import Workflow
from torchserve_dag.server import java, ports

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
class Both:
    """One server: it runs TorchServe's own workflows at `wfpredict`, and our archive of one at `predictions`."""

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


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    if not STOCK.exists():
        pytest.fail("The second environment is not there; run scripts/setup --stock first.", pytrace=False)
    root = tmp_path_factory.mktemp("both")
    specs.write_store(root / "model_store")
    for folder in ("workflows", "handlers", "tmp"):
        (root / folder).mkdir()
    write_war(root, "parts", PARTS, PARTS_FUNCTIONS, **{"shown.py": SHOWN})
    run_tool(root, "check", "parts")
    run_tool(root, "build", "parts")
    inference, management, metrics, grpc, grpc_management = ports.free(["127.0.0.1"] * 5)
    (root / "config.properties").write_text(
        f"inference_address=http://127.0.0.1:{inference}\nmanagement_address=http://127.0.0.1:{management}\n"
        f"metrics_address=http://127.0.0.1:{metrics}\ngrpc_inference_port={grpc}\ngrpc_management_port={grpc_management}\n"
        "vmargs=-Xmx1g -Djava.util.concurrent.ForkJoinPool.common.parallelism=1\n"
        "load_models=parts-1.0.mar\ndisable_token_authorization=true\nenable_model_api=true\n"
    )
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(root),
        "JAVA_HOME": str(java.find()),
        "TEMP": str(root / "tmp"),
        "TMPDIR": str(root / "tmp"),
    }
    command = [STOCK, "-m", "ts.model_server", "--start", "--ncs", "--foreground", "--ts-config", "config.properties"]
    command += ["--model-store", root / "model_store", "--workflow-store", root / "workflows"]
    with (
        (root / "out.log").open("w") as log,
        subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            server = Both(root, f"http://127.0.0.1:{inference}", f"http://127.0.0.1:{management}")
            wait_for(server, "parts")
            yield server
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def wait_for(server: Both, model: str) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{server.management}/models/{model}", timeout=10)
            if answer.status_code == 200 and answer.json()[0]["workers"][0]["status"] == "READY":
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail(f"Not ready within {READY_S} s:\n{(server.root / 'out.log').read_text()[-3000:]}", pytrace=False)


@pytest.mark.parametrize("name", specs.OWN)
def test_torchserve_answers_its_own_workflows_as_we_do(both: Both, name: str) -> None:
    file = f"own{list(specs.OWN).index(name)}"
    # A worker has torch in it: one of each is enough. For a lost answer TorchServe waits the whole timeout.
    text = specs.OWN[name].replace("max-workers: 4", "max-workers: 1").replace("300000", "3000")
    registered = both.register(file, text)
    assert registered.status_code == 200, registered.text
    theirs = httpx.post(f"{both.inference}/wfpredict/{file}", content=b"a body", timeout=60)
    httpx.delete(f"{both.management}/workflows/{file}", timeout=60)

    with Workflow.load(both.root / "workflows" / f"{file}.war") as workflow:
        (ours,) = workflow([b"a body"])

    assert theirs.status_code == 200, theirs.text
    assert (json.loads(ours) if isinstance(ours, bytes) else ours) == theirs.json()


@pytest.mark.parametrize("name", specs.REFUSED)
def test_torchserve_refuses_what_we_refuse(both: Both, name: str) -> None:
    answer = both.register("refused", specs.REFUSED[name])

    assert answer.status_code in {400, 500}, answer.text


FORM = {"data": "abc", "other": "x"}
FILES = {"data": ("a.json", b'{"a": [1]}', "application/json"), "image": ("b", b"\xff\x00", "application/octet-stream")}


@pytest.mark.parametrize(
    "request_",
    [
        {"content": b"plain bytes"},
        {"content": b'{"a": [1]}', "headers": {"Content-Type": "application/json", "X-One": "1"}},
        {"content": b'{"a": ', "headers": {"Content-Type": "application/json"}},
        {"content": "gr\u00fc\u00df".encode(), "headers": {"Content-Type": "text/plain; charset=utf-8"}},
        {"data": FORM, "headers": {"X-One": "1"}},
        {"files": FILES, "data": {"k": "v"}},
    ],
    ids=["bytes", "json", "broken json", "text", "form", "files"],
)
def test_a_war_served_by_our_engine_gives_its_nodes_what_torchserve_gives_them(both: Both, request_: Any) -> None:
    """The same `.war`, the same request: the parts by their names, decoded alike, and the headers at every node."""
    if httpx.get(f"{both.management}/workflows/parts", timeout=30).status_code != 200:
        registered = httpx.post(f"{both.management}/workflows", params={"url": "parts.war"}, timeout=READY_S)
        assert registered.status_code == 200, registered.text
    theirs = httpx.post(f"{both.inference}/wfpredict/parts", timeout=60, **request_)
    ours = httpx.post(f"{both.inference}/predictions/parts", timeout=60, **request_)

    assert (theirs.status_code, ours.status_code) == (200, 200), (theirs.text, ours.text)
    assert ours.json() == theirs.json()
