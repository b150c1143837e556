"""What a served workflow of a language model keeps of its requests, and the metrics of the whole of it, on each host."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable

import httpx

from tests.live.conftest import Serving
from torchserve_dag.clients import RestClient
from torchserve_dag.runtime.messages import Chat

WORKFLOW = """
name: answering
version: "1.0"
does: Answers a chat, and says so.
nodes:
  speak: {handler: speaker}
  answer: {function: said, inputs: {chunks: speak}}
output: answer
serve: {keep: {redact: redact}}
"""

FUNCTIONS = """
from torchserve_dag import Text, TextChunk

def said(chunks: list[TextChunk]) -> Text:
    return Text("".join(chunk.text for chunk in chunks))

def redact(text: str) -> str:
    return text.replace("Ada", "[name]")
"""

SPEAKER = """
from torchserve_dag import Chat, ContinuousHandler, EngineLoad, Prompt, Reply, TextChunk, Usage

class Speaker(ContinuousHandler[Chat | Prompt, TextChunk]):
    def load(self, folder, settings, placement): pass
    def example(self) -> Chat: return Chat.of("Hello")
    def start(self, item: Chat | Prompt, reply: Reply[TextChunk]):
        reply.chunk(TextChunk("Hello, A"))
        reply.chunk(TextChunk("da!", finish_reason="stop", usage=Usage.of(7, 2)))
        reply.end()
        return lambda: None
    def load_now(self) -> EngineLoad: return EngineLoad(engine="spoken")
"""

FILES = {
    "workflows/answering.yaml": WORKFLOW,
    "workflows/answering.py": FUNCTIONS,
    "handlers/speaker.py": SPEAKER,
    "handlers/speaker.yaml": """
        name: speaker
        version: "1.0"
        card: {does: It speaks., input: A chat., output: Text., limits: None., weights: []}
        """,
}

OF_WORKFLOW = ("gen_ai_invoke_agent_duration_seconds_count", "torchserve_dag_kept_total")


def ask(rest: RestClient) -> None:
    assert rest.predict("answering", Chat.of("I am Ada.")) == {"text": "Hello, Ada!"}


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def numbers(server: Serving) -> dict[str, tuple[dict[str, str], float]]:
    """Those of the whole workflow: labels and value by the metric's name."""
    page = httpx.get(f"{server.addresses.metrics}/metrics").raise_for_status().text
    return {
        name: (dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value))
        for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", page, re.MULTILINE)
        if name in OF_WORKFLOW and 'workflow="answering"' in labels
    }


def test_requests_are_kept_redacted_and_counted(server: Serving) -> None:
    with server.rest() as rest:
        for _ in range(3):
            ask(rest)
    file = server.state.logs / "conversations.jsonl"
    until(lambda: file.is_file() and file.read_text("utf-8").count("\n") == 3)
    until(lambda: [value for _, value in numbers(server).values()] == [3, 3])

    assert {line["answer"]["text"] for line in map(json.loads, file.read_text("utf-8").splitlines())} == {
        "Hello, [name]!"
    }
    assert "Ada" not in file.read_text("utf-8")
    found = {name: labels for name, (labels, _) in numbers(server).items()}
    assert found.keys() == set(OF_WORKFLOW)
    assert all("node" not in labels for labels in found.values())
    assert found[OF_WORKFLOW[0]]["gen_ai_operation_name"] == "invoke_workflow"
    assert found[OF_WORKFLOW[0]]["gen_ai_agent_name"] == "answering"


def test_no_other_log_has_what_was_asked_or_answered(server: Serving) -> None:
    with server.rest() as rest:
        ask(rest)
    logs = [path for path in server.state.logs.rglob("*") if path.is_file()]

    assert logs
    assert [path.name for path in logs if b"Ada" in path.read_bytes()] == []
