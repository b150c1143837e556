"""The workflow as a Python object: no server is needed. Run it with: python -m pytest"""

from __future__ import annotations

from pathlib import Path

from torchserve_dag import Failure, Workflow

ROOT = Path(__file__).parents[1]


def test_each_sentence_has_its_language() -> None:
    with Workflow.load(ROOT / "workflows" / "languages.yaml") as workflow:
        answer, blank = workflow([b"Where is the station? Wo ist der Bahnhof?", b" "])

    assert [sentence.language for sentence in answer.sentences] == ["English", "German"]
    assert isinstance(blank, Failure)
    assert blank.status == 422
