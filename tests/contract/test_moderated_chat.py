"""The workflow `moderated_chat` with the demo's language model and its filter of words."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchserve_dag import Chat, Moderation, Text, TextChunk, Workflow
from torchserve_dag.runtime.models.load import load_handler
from torchserve_dag.runtime.project.folders import Project

ASKED: dict[str, Any] = {"temperature": 0, "max_tokens": 160}
STORY = "Tell me about a sailor who lost his way in a storm."


@pytest.fixture(scope="module")
def workflow(project: Project) -> Any:
    with Workflow.load(project.root / "workflows" / "moderated_chat.yaml", device="cpu") as loaded:
        yield loaded


def text_of(chunks: Sequence[TextChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_what_is_clean_is_answered_as_the_model_alone_answers(workflow: Workflow) -> None:
    chunks = list(workflow.stream(Chat.of("What is the capital of France?", temperature=0, max_tokens=16)))

    assert text_of(chunks) == "The capital of France is Paris."
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens > 5
    assert (chunks[-1].served_by or "").startswith("openvino ")


def test_a_prompt_that_the_filter_knows_is_refused(workflow: Workflow) -> None:
    (chunk,) = workflow.stream(Chat.of("You stupid jerk, what is the capital of France?", **ASKED))

    assert chunk.text == "This cannot be answered: it was flagged as profanity."
    assert chunk.finish_reason == "content_filter"


def test_an_answer_ends_before_its_first_piece_that_reaches_the_threshold(
    workflow: Workflow, project: Project, tmp_path: Path
) -> None:
    """The threshold is just below the highest score of this answer's pieces; the model and the filter are real."""
    functions = workflow.graph.nodes["pieces"].code.kind.function.__globals__  # type: ignore[attr-defined]
    whole = list(workflow.stream(Chat.of(STORY, **ASKED)))
    pieces = asyncio.run(_all(functions["pieces"](_source(whole))))
    stages = load_handler(project, project.handler("text_moderation"), device="cpu")
    verdicts = stages([functions["prompt"](Chat.of(STORY)), *(piece.checked for piece in pieces)])
    of_prompt, *scores = [verdict.category_scores["profanity"] for verdict in verdicts]
    highest = scores.index(max(scores))
    others = [of_prompt, *scores[:highest]]
    assert highest > 0
    assert max(scores) > max(others)

    between = (max(scores) + max(others)) / 2  # a score's last bit is not the same in every run
    with Workflow.load(_stricter(project, tmp_path, between), device="cpu") as strict:
        chunks = list(strict.stream(Chat.of(STORY, **ASKED)))

    assert text_of(chunks) == "".join(piece.chunk.text for piece in pieces[:highest])
    assert chunks[-1].finish_reason == "content_filter"


def test_the_filter_is_a_model_by_itself(project: Project) -> None:
    with Workflow.load(project.root / "handlers" / "text_moderation.yaml", device="cpu") as model:
        bad, good = model([Text("Shut up, you stupid jerk!"), b"The capital of France is Paris."])

    assert isinstance(bad, Moderation)
    assert (bad.flagged, bad.categories, good.flagged) == (True, {"profanity": True}, False)


async def _source(chunks: Sequence[TextChunk]) -> AsyncIterator[TextChunk]:
    for chunk in chunks:
        yield chunk


async def _all(iterator: AsyncIterator[Any]) -> list[Any]:
    return [one async for one in iterator]


def _stricter(project: Project, folder: Path, threshold: float) -> Path:
    """The workflow in a project with another threshold."""
    (folder / "weights").symlink_to(project.root / "weights")
    (folder / "workflows").mkdir()
    (folder / "handlers").mkdir()
    for path in (project.root / "workflows").glob("moderated_chat.*"):
        shutil.copy(path, folder / "workflows")
    for path in (project.root / "handlers").glob("text_*"):
        (folder / "handlers" / path.name).symlink_to(path)
    file = yaml.safe_load((project.root / "handlers" / "text_moderation.yaml").read_text("utf-8"))
    file["settings"]["categories"]["profanity"]["threshold"] = threshold
    (folder / "handlers" / "text_moderation.yaml").unlink()
    (folder / "handlers" / "text_moderation.yaml").write_text(yaml.safe_dump(file))
    return folder / "workflows" / "moderated_chat.yaml"
