"""A TorchServe with the project's own settings, and a project of one workflow to build archives in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import contract
import works

from torchserve_dag.runtime.data import source
from torchserve_dag.server import java, properties
from torchserve_dag.server.ports import Addresses

SHARED = ("config.properties", "log4j2.xml")


def project(workflow: Path, folder: Path) -> tuple[Path, str, str]:
    """A project in `folder` with all that a workflow's own has, its name and its version."""
    root = folder / "project"
    root.mkdir()
    own = workflow.parent.parent
    for name in ("handlers", "workflows", "weights", *SHARED):
        found = own / name if name not in SHARED else works.ROOT / name
        if found.exists():
            (root / name).symlink_to(found)
    data, _ = source.read_plain(workflow)
    return root, data["name"], data["version"]


def tool(root: Path, *words: str) -> None:
    """`torchserve-dag WORDS` in a project."""
    command = [sys.executable, "-m", "torchserve_dag", *words]
    subprocess.run(command, cwd=root, stdout=sys.stderr, check=True)  # noqa: S603 (our own arguments)


def start(folder: Path, model_store: Path, **settings: str) -> tuple[Addresses, subprocess.Popen[bytes]]:
    """Start TorchServe with the project's `config.properties`, `settings` instead of what it says, and no tokens."""
    where = Addresses().with_free_ports()
    config = folder / "config.properties"
    changes = {
        **properties.listening_at(where),
        "disable_token_authorization": "true",
        "enable_model_api": "true",
        "load_models": "",
        **settings,
    }
    properties.write(works.ROOT / "config.properties", config, changes)
    command: contract.Command = [sys.executable, "-m", "ts.model_server", "--start", "--ncs", "--foreground"]
    command += ["--ts-config", config, "--model-store", model_store, "--workflow-store", model_store]
    environment = {"JAVA_HOME": str(java.find()), "TEMP": str(folder), "LOG_LOCATION": str(folder / "logs")}
    return where, contract.start(command, folder, METRICS_LOCATION=str(folder / "logs"), **environment)
