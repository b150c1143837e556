# /// script
# dependencies = []
# [tool.bench]
# name = "torchserve-dag"
# arrangement = """\
# As the project's own files say: one process that uses every core, one lane a core, several of TorchServe's batches \
# at a time; batches of objects as the handlers' `run.batch` says (decisions 8 and 13 in docs/decisions)."""
# ///
"""This project: the workflow's archive, as `torchserve-dag build` and `up` serve it."""

from __future__ import annotations

import argparse
from pathlib import Path

import contract
import torchserve

from torchserve_dag.clients import KeyFile
from torchserve_dag.server.connect import running
from torchserve_dag.server.state import State


def main(workflow: Path) -> None:
    with contract.alone() as folder:
        root, name, version = torchserve.project(workflow, folder)
        torchserve.tool(root, "build", f"{name}/{version}")
        try:
            torchserve.tool(root, "up", "--free-ports", "--no-front-door")
            state = State(root)
            where, token = running(state).addresses, KeyFile.read(state.key_file).inference
            served = contract.Served(
                rest=f"{where.inference}/predictions/{name}/{version}",
                headers={"Authorization": f"Bearer {token}"},
                grpc={"target": where.grpc_inference, "model": name, "version": version, "token": token},
                metrics=f"{where.metrics}/metrics",
            )
            contract.announce(served, workflow)
        finally:
            torchserve.tool(root, "down")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("workflow", type=Path)
    main(parser.parse_args().workflow.resolve())
