"""OpenAI's API at `/v1` of a real server, called by OpenAI's own client, untouched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.conftest import Serving, serve_files

WITHIN_S = 120

FILES: dict[str, str | Path] = {
    "workflows/talk.yaml": """
        name: talk
        version: "1.0"
        does: Says the last message word by word.
        nodes: {talk: {function: talk}}
        output: talk
        serve: {timeout_s: 60}
        """,
    "workflows/talk.py": """
        import os
        import time
        from collections.abc import Iterator
        from pathlib import Path
        from torchserve_dag import Chat, InputError, Prompt, TextChunk
        from torchserve_dag.runtime.messages import FunctionCall, TokenLogprob, ToolCall

        def talk(asked: Chat | Prompt) -> Iterator[TextChunk]:
            said = asked.messages[-1].text if isinstance(asked, Chat) else asked.prompt
            if said.startswith("gate "):
                yield from through(Path(said.removeprefix("gate ")))
                return
            if said == "die":
                yield TextChunk("I am dying")
                time.sleep(0.5)
                os._exit(1)
            if said == "refuse":
                raise InputError("temperature: the engine cannot do that.", 400)
            if said == "fail later":
                yield TextChunk("So far")
                raise InputError("It went wrong later.", 422)
            if isinstance(asked, Chat) and asked.tools:
                name = asked.tools[0].function.name
                yield TextChunk(tool_calls=[ToolCall(FunctionCall(name, '{"city":'), "call_7", "function", 0)])
                end = [ToolCall(FunctionCall(None, ' "Oslo"}'), index=0)]
                yield TextChunk(tool_calls=end, finish_reason="tool_calls")
                return
            limit = asked.most_tokens or 1000
            for index in range(asked.n or 1):
                words = said.split()
                for at, word in enumerate(words[:limit]):
                    last = at + 1 == min(len(words), limit)
                    reason = ("stop" if len(words) <= limit else "length") if last else None
                    text = word if at == 0 else " " + word
                    logprobs = [TokenLogprob(text, -0.5, [TokenLogprob("x", -1.0)])] if asked.logprobs else None
                    engine = f"function {asked.adapter or ''}".strip() if last else None
                    yield TextChunk(text, index, reason, logprobs=logprobs, served_by=engine)

        def through(gate: Path) -> Iterator[TextChunk]:
            yield TextChunk("begun")
            try:
                while not gate.exists():
                    time.sleep(0.01)
                    yield TextChunk(" tick")
            finally:
                gate.with_name(gate.name + ".left").touch()
        """,
    "workflows/plain.yaml": """
        name: plain
        version: "1.0"
        does: Says the last message loudly, in texts that end without a reason.
        nodes: {say: {function: say}}
        output: say
        """,
    "workflows/plain.py": """
        from collections.abc import Iterator
        from torchserve_dag import Chat, Text

        def say(chat: Chat) -> Iterator[Text]:
            for word in chat.messages[-1].text.split():
                yield Text(word.upper() + " ")
        """,
    "workflows/whole.yaml": """
        name: whole
        version: "1.0"
        does: Says the last message in one piece.
        nodes: {say: {function: say}}
        output: say
        """,
    "workflows/whole.py": """
        from torchserve_dag import Chat

        def say(chat: Chat) -> str:
            return chat.messages[-1].text[::-1]
        """,
    "workflows/vectors.yaml": """
        name: vectors
        version: "1.0"
        does: Makes a vector of a text.
        nodes: {embed: {function: embed}}
        output: embed
        """,
    "workflows/vectors.py": """
        from torchserve_dag import Embedding, Text, Usage

        def embed(text: Text) -> Embedding:
            return Embedding([float(len(text.text)), 0.25, -1.5], Usage.of(len(text.text.split())))
        """,
    "workflows/upper.yaml": """
        name: upper
        version: "1.0"
        does: It is no language model.
        nodes: {upper: {function: upper}}
        output: upper
        """,
    "workflows/upper.py": """
        from torchserve_dag import Text

        def upper(request: Text) -> str:
            return request.text.upper()
        """,
}


@pytest.fixture(scope="module", params=["direct"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    yield from serve_files(request, tmp_path_factory.mktemp("gateway"), request.param)
