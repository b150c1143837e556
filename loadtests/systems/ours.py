"""This project as a system under test, on either of its hosts."""

from __future__ import annotations

import argparse
from pathlib import Path

import contract
import torchserve

from torchserve_dag.clients import KeyFile
from torchserve_dag.server.connect import running
from torchserve_dag.server.state import Host, State


def main(host: Host) -> None:
    """Serve the workflow that the command line names, until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workflow", type=Path)
    workflow = parser.parse_args().workflow.resolve()
    with contract.alone() as folder:
        root, name, version = torchserve.project(workflow, folder)
        torchserve.tool(root, "build", f"{name}/{version}")
        try:
            torchserve.tool(root, "up", "--free-ports", "--no-front-door", "--host", host)
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
