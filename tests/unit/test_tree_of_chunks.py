"""The terminal's tree names the nodes whose chunks a function takes."""

from __future__ import annotations

from pathlib import Path

from tests.unit.test_chunks_stops_rounds import workflow
from torchserve_dag import Workflow
from torchserve_dag.pictures.tree import tree


def test_a_function_over_chunks_says_whose_they_are(tmp_path: Path) -> None:
    nodes = """
        words: {function: words}
        loud: {function: loud, each: words}
        pairs: {function: pairs, inputs: {left: words, right: loud, last: verdict}}
        verdict: {function: loud, input: request}
    """
    with Workflow.load(workflow(tmp_path, nodes, "pairs")) as flow:
        lines = [line.strip("│ ") for line in tree(flow.graph).splitlines()]

    assert "reads words as it comes: Text" in lines
    assert "reads loud as it comes: Text" in lines
    assert "each words, as it comes: Text" in lines
