"""`evaluate` with real models: two versions on labelled photos, and two prompts of one language model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.contract.conftest import ROOT
from torchserve_dag.archives.archive import read_archive
from torchserve_dag.archives.build import build
from torchserve_dag.commands import app
from torchserve_dag.runtime.project.folders import Project

CAPITAL = """
from __future__ import annotations

from torchserve_dag import Chat, ChatMessage, Text

SYSTEM = ChatMessage("system", "You name the capitals of countries.")
EXAMPLES = [
    ChatMessage("user", "What is the capital of Belgium?"),
    ChatMessage("assistant", "Brussels"),
    ChatMessage("user", "What is the capital of Chile?"),
    ChatMessage("assistant", "Santiago"),
]


def ask(question: Text) -> Chat:
    return _chat([SYSTEM], question)


def ask_by_example(question: Text) -> Chat:
    return _chat([SYSTEM, *EXAMPLES], question)


def _chat(before: list[ChatMessage], question: Text) -> Chat:
    return Chat(messages=[*before, ChatMessage("user", question.text)], temperature=0.0, max_tokens=12)
"""
FLOW = """
name: capital
version: "{}"
does: Names the capital of a country.
code: capital.py
nodes:
  ask: {{function: {}}}
  answer: {{handler: text_generation, input: ask}}
output: answer
"""
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo",
    "Russia": "Moscow", "China": "Beijing", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna",
    "Ireland": "Dublin", "Poland": "Warsaw", "Sweden": "Stockholm", "Norway": "Oslo", "Hungary": "Budapest",
    "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi", "India": "New Delhi",
}  # fmt: skip


@pytest.fixture
def own(project: Project, tmp_path: Path) -> Path:
    """A project with this one's models, and a store and evaluations of its own."""
    for name in ("handlers", "weights", "photos"):
        (tmp_path / name).symlink_to(project.root / name)
    return tmp_path


def evaluate(root: Path, *words: str, code: int) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["evaluate", *words, "--json", "--project", str(root)])
    assert done.exit_code == code, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    assert [one["errors"] for one in found["evaluations"]] == [0, 0]
    return found


def test_two_versions_are_compared_on_labelled_photos(own: Path) -> None:
    """Both find the same; the second names fewer objects, and more of them rightly."""
    (own / "workflows").symlink_to(ROOT / "workflows")
    (own / "evaluations").mkdir()
    for name in ("photos.jsonl", "scores.py"):
        shutil.copy(ROOT / "evaluations" / name, own / "evaluations")
    assert not build(Project(own), ["detect_classify"]).problems
    data, functions = own / "evaluations" / "photos.jsonl", own / "evaluations" / "scores.py"
    scores = ["--score", "recall@20:objects.label", "--score", f"{functions}:names_right"]
    found = evaluate(
        own, "detect_classify/2.0", "--against", "detect_classify/1.0", "--data", str(data), *scores, code=0
    )

    rows = {row["what"]: row for row in found["differences"]}
    recall, named = rows["recall@20:objects.label"], rows["names_right"]
    assert recall["first"] == recall["second"] == 0.75  # neither the cat nor the astronaut is found
    assert 0.4 < named["first"] < named["second"] < 0.8
    assert named["needed"]  # eight photos do not settle it
    kept = json.loads((own / "evaluations" / "detect_classify-2.0.json").read_text())
    assert kept["archive"] == read_archive(own / "model_store" / "detect_classify-2.0.mar").hash
    assert (kept["data"], kept["items"]) == ("evaluations/photos.jsonl", 8)


def test_two_prompts_of_a_language_model_are_compared(own: Path) -> None:
    """With examples in its prompt the model answers by a name alone, and by a wrong one more often."""
    (own / "workflows").mkdir()
    (own / "workflows" / "capital.py").write_text(CAPITAL)
    for version, function in (("1.0", "ask"), ("2.0", "ask_by_example")):
        (own / "workflows" / f"capital-{version}.yaml").write_text(FLOW.format(version, function))
    assert not build(Project(own), ["capital"]).problems
    lines = [{"id": c, "input": f"What is the capital of {c}?", "expected": city} for c, city in CAPITALS.items()]
    (own / "capitals.jsonl").write_text("\n".join(map(json.dumps, lines)))
    scores = ["--score", "exact", "--score", "contains", "--score", "similarity"]
    words = ("capital/2.0", "--against", "capital/1.0", "--data", str(own / "capitals.jsonl"))
    found = evaluate(own, *words, *scores, code=1)  # a score is worse

    rows = {row["what"]: row for row in found["differences"]}
    assert rows["exact"]["first"] == 0
    assert rows["exact"]["low"] > 0  # settled by twenty questions
    assert rows["contains"]["first"] > 0.5
    assert rows["contains"]["high"] < 0
    assert all(0.4 < rows["similarity"][which] < 0.95 for which in ("first", "second"))
