# /// script
# dependencies = []
# [tool.bench]
# name = "TorchServe, native workflow"
# arrangement = """\
# The `.war` of `torchserve-dag build`: one worker a model, requests in batches of 16, as many lanes as cores; chains \
# are function nodes, one process each, which TorchServe runs without batches \
# (docs.pytorch.org/serve/workflows.html)."""
# ///
"""TorchServe's own workflow engine: the `.war` that `torchserve-dag build` writes, or functions in one of their own."""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import contract
import httpx
import torchserve
import works
import yaml
from workflow_archiver.workflow_packaging import package_workflow
from workflow_archiver.workflow_packaging_utils import WorkflowExportUtils

SAME = "def {name}(data, context):\n    return data and [row.get('body') for row in data]\n"
"""A function of a chain. TorchServe calls it once with nothing, when it loads it."""


def main(workflow: Path) -> None:
    with contract.alone() as folder:
        work = works.work(workflow)
        store = folder / "project" / "workflow_store"
        if workflow.stem.startswith("chain"):
            store.mkdir(parents=True)
            archive = _chain(work, store)
        else:
            root, name, version = torchserve.project(workflow, folder)
            torchserve.tool(root, "build", f"{name}/{version}")
            archive = f"{name}-{version}.war"
        where, child = torchserve.start(folder, store)
        _register(where.management, archive)
        served = contract.Served(rest=f"{where.inference}/wfpredict/{work.name}", metrics=f"{where.metrics}/metrics")
        contract.announce(served, workflow, child)


def _chain(work: works.Work, store: Path) -> str:
    """A workflow of functions only, which the exporter leaves to be written by hand."""
    names = [stage.name for stage in work.stages]
    dag = {before: [after] for before, after in itertools.pairwise(names)} or {names[0]: []}
    # TorchServe loses an answer now and then, and asks again after the timeout.
    spec = {"models": {"retry-attempts": 5, "timeout-ms": 2000}, "dag": dag}
    (store / "spec.yaml").write_text(yaml.safe_dump(spec), "utf-8")
    (store / "functions.py").write_text("\n\n".join(SAME.format(name=name) for name in names), "utf-8")
    arguments = argparse.Namespace(
        workflow_name=work.name,
        spec_file=str(store / "spec.yaml"),
        handler=str(store / "functions.py"),
        extra_files=None,
        export_path=str(store),
        force=True,
    )
    package_workflow(arguments, WorkflowExportUtils.generate_manifest_json(arguments))
    return f"{work.name}.war"


def _register(management: str, archive: str) -> None:
    deadline = time.monotonic() + contract.START_S
    while True:
        try:
            answer = httpx.post(f"{management}/workflows", params={"url": archive}, timeout=contract.START_S)
        except httpx.TransportError:  # not there yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            answer.raise_for_status()
            return


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("workflow", type=Path)
    main(parser.parse_args().workflow.resolve())
