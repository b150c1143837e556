"""A project with the repository's own workflows, and a language model that writes what a chat's first message scripts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchserve_dag import Chat

ROOT = Path(__file__).parents[1]
HANDLER = """
import json
from collections.abc import Callable
from pathlib import Path

from torchserve_dag import Chat, ContinuousHandler, FunctionCall, NoSettings, Placement, Reply, TextChunk, ToolCall, Usage


class Scripted(ContinuousHandler[Chat, TextChunk]):
    '''Writes the answers that stand in a chat's first message of the user, one a round, in chunks.'''

    room = 64

    def load(self, folder: Path, settings: NoSettings, placement: Placement) -> None:
        '''There is nothing to load.'''

    def example(self) -> Chat:
        return Chat.of('[{"text": "Hello"}]')

    def start(self, item: Chat, reply: Reply[TextChunk]) -> Callable[[], None]:
        script = json.loads(next(message.text for message in item.messages if message.role == "user"))
        said = script[min(sum(message.role == "assistant" for message in item.messages), len(script) - 1)]
        text, calls = echo(item) if "echo" in said else said.get("text", ""), said.get("calls", [])
        size = max(5, len(text) // 8)
        for begin in range(0, len(text), size):
            reply.chunk(TextChunk(text[begin : begin + size]))
        for place, (name, arguments) in enumerate(calls):  # in two parts, as servers of OpenAI's API send them
            first = FunctionCall(name, arguments[:3])
            reply.chunk(TextChunk(tool_calls=[ToolCall(first, f"c{place}", "function", place)]))
            reply.chunk(TextChunk(tool_calls=[ToolCall(FunctionCall(None, arguments[3:]), index=place)]))
        reason = said.get("reason", "tool_calls" if calls else "stop")
        tokens = said.get("tokens", 10)
        reply.chunk(TextChunk(finish_reason=reason, usage=Usage.of(100, tokens), served_by="scripted"))
        reply.end()
        return lambda: None


def echo(item: Chat) -> str:
    results = [(message.tool_call_id, message.text) for message in item.messages if message.role == "tool"]
    tools = [tool.function.name for tool in item.tools or []]
    return json.dumps({"max_tokens": item.max_tokens, "tools": tools, "results": results})
"""
CARD = """
name: text_generation
version: "1.0"
card: {does: It writes., input: A chat., output: A text., limits: A test., weights: []}
"""


def scripted_project(folder: Path, *workflows: str) -> Path:
    """A project in `folder` that has these workflows, and the scripted model in place of `text_generation`."""
    for name in ("handlers", "workflows"):
        (folder / name).mkdir()
    (folder / "handlers" / "text_generation.py").write_text(HANDLER)
    (folder / "handlers" / "text_generation.yaml").write_text(CARD)
    copy_workflows(folder, *workflows)
    return folder


def copy_workflows(folder: Path, *workflows: str) -> None:
    for name in workflows:
        for suffix in ("py", "yaml"):
            shutil.copy(ROOT / "workflows" / f"{name}.{suffix}", folder / "workflows")


def script(said: Sequence[dict[str, Any]], **sampling: Any) -> Chat:
    """A chat in which the model says this, one a round, and the last again and again."""
    return Chat.of(json.dumps(list(said)), **sampling)
