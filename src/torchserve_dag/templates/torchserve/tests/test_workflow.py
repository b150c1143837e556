"""The archive loads, with no server anywhere. Run it with: python -m pytest"""

from __future__ import annotations

from pathlib import Path

from torchserve_dag import Workflow

WORKFLOWS = sorted((Path(__file__).parents[1] / "workflows").glob("*.yaml"))


def test_every_workflow_loads() -> None:
    assert WORKFLOWS
    for path in WORKFLOWS:
        with Workflow.load(path) as workflow:
            assert workflow.graph.name == path.stem
