"""A workflow that asks a hosted model, and has its own small model answer where that fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_llama import chat_prompt, greedy_text, make_gguf, make_llama
from tests.unit.openai_server import WORDS, OpenAiServer
from torchserve_dag import Chat, FailedError, Workflow

ROOT = Path(__file__).parents[2]
HANDLER = """
name: {name}
version: "1.0"
code: text_generation.py
settings: {settings}
card: {{does: It writes., input: A chat., output: A text., limits: A test., weights: []}}
"""
WORKFLOW = """
name: ask
version: "1.0"
does: Asks the hosted model, and the own one where that fails.
nodes:
  ask: {handler: hosted, timeout_s: 5, on_error: {fallback: {handler: own}}}
output: ask
"""


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAiServer]:
    with OpenAiServer() as server:
        yield server


def project(folder: Path, url: str) -> Path:
    for name in ("handlers", "workflows", "weights"):
        (folder / name).mkdir()
    shutil.copy(ROOT / "handlers" / "text_generation.py", folder / "handlers")
    remote = f"{{engine: remote, model: capital, remote: {{url: '{url}', retries: 0, timeout_s: 1}}}}"
    own = "{engine: openvino, model: gguf/llama.gguf, exact: true, context: 256, max_tokens: 16, temperature: 0}"
    for name, settings in (("hosted", remote), ("own", own)):
        (folder / "handlers" / f"{name}.yaml").write_text(HANDLER.format(name=name, settings=settings))
    (folder / "workflows" / "ask.yaml").write_text(WORKFLOW)
    make_gguf(folder / "weights" / "gguf", make_llama(folder / "llama"), half=True)
    return folder


@pytest.fixture(scope="module")
def folder(server: OpenAiServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project(tmp_path_factory.mktemp("project"), server.url)


@pytest.fixture(scope="module")
def workflow(folder: Path) -> Iterator[Workflow]:
    with Workflow.load(folder / "workflows" / "ask.yaml") as workflow:
        yield workflow


def answer(workflow: Workflow, text: str) -> tuple[str, str | None]:
    """The text, and who wrote it."""
    chunks = list(workflow.stream(Chat.of(text)))
    return "".join(chunk.text for chunk in chunks), chunks[-1].served_by


def test_the_hosted_model_answers_while_it_can(workflow: Workflow) -> None:
    assert answer(workflow, "The capital?") == ("".join(WORDS), "remote capital-2")


@pytest.mark.parametrize("fault", ["busy for long", "always broken", "no answer"])
def test_where_the_hosted_model_fails_the_own_one_answers_and_says_so(
    workflow: Workflow, folder: Path, fault: str
) -> None:
    """After 429, 500 and a time-out."""
    llama = folder / "llama"
    own = greedy_text(llama, chat_prompt(llama, fault), 16)

    assert answer(workflow, fault) == (own, "openvino llama")


def test_after_its_first_chunk_nobody_stands_in(workflow: Workflow) -> None:
    """The client has the beginning of another answer: it is told that there is no end."""
    with pytest.raises(FailedError):
        answer(workflow, "stops in the middle")


def test_a_hosted_model_that_is_away_does_not_keep_the_workflow_from_serving(tmp_path: Path) -> None:
    folder = project(tmp_path, "http://127.0.0.1:9/v1")

    with Workflow.load(folder / "workflows" / "ask.yaml") as workflow:
        assert answer(workflow, "Anyone?")[1] == "openvino llama"
