"""A server for the workflows of language models that the project comes with, on the models of the demo."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.live.conftest import ROOT, Serving, run_tool, serve_project
from tests.live.openai_access import Access
from torchserve_dag.front_door.start import own_token

MODELS = (
    "ask_docs",
    "chat_with_fallback",
    "describe_photo",
    "extract",
    "moderated_chat",
    "prompted",
    "text_moderation",
    "tools",
)


PROMPTED = """
    name: prompted
    version: "{version}"
    does: Answers with a prompt of its own.
    code: prompted_{version[0]}.py
    nodes:
      prompted: {{function: prompted}}
      answer: {{handler: text_generation, input: prompted}}
    output: answer
    """
FUNCTION = """
    from dataclasses import replace
    from torchserve_dag import Chat
    from torchserve_dag.runtime.messages import ChatMessage

    def prompted(chat: Chat) -> Chat:
        return replace(chat, messages=[ChatMessage("system", "{prompt}"), *chat.messages])
    """
PROMPTS = {
    "1.0": "Answer in two long sentences, with all that you know.",
    "2.0": "Answer with the name of the city only, in one word.",
}


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    root = tmp_path_factory.mktemp("language")
    for name in ("handlers", "workflows"):
        shutil.copytree(ROOT / name, root / name)
    for name in ("weights", "photos"):
        (root / name).symlink_to(ROOT / name)
    for version, prompt in PROMPTS.items():
        (root / "workflows" / f"prompted-{version}.yaml").write_text(textwrap.dedent(PROMPTED).format(version=version))
        module = root / "workflows" / f"prompted_{version[0]}.py"
        module.write_text(textwrap.dedent(FUNCTION).format(prompt=prompt))
    documents = root / "documents"
    documents.mkdir()
    for name in ("exposed.md", "releasing.md", "serving.md"):
        shutil.copy(ROOT / "docs" / name, documents)
    run_tool(root, "index", str(documents), "--name", "docs")
    yield from serve_project(root, "direct", MODELS)


@pytest.fixture(scope="package")
def access(server: Serving) -> Access:
    return Access(server, own_token(server.state))


@pytest.fixture(scope="package")
def client(access: Access) -> Iterator[openai.OpenAI]:
    with access.sync() as found:
        yield found


@pytest.fixture(scope="package")
def photo_path() -> Path:
    return ROOT / "photos"
