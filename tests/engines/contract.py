"""What every engine of a language model keeps, as tests: subclass `EngineContract` in the file of an engine."""

from __future__ import annotations

import json
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.engines.written import Written, start, until
from tests.tiny_llama import chat_prompt, greedy_text
from torchserve_dag import Chat, InputError, Prompt
from torchserve_dag.runtime.messages import FunctionTool, JsonSchema, ResponseFormat, Tool
from torchserve_dag.runtime.models.language.engine import ALWAYS, LanguageEngine
from torchserve_dag.runtime.models.language.model import LanguageModel
from torchserve_dag.runtime.models.language.settings import LanguageSettings

PROMPT = "What is the capital of France?"
PROMPTS = [f"{PROMPT} {place}" for place in range(8)]
SCHEMA = {
    "type": "object",
    "properties": {"sunny": {"type": "boolean"}},
    "required": ["sunny"],
    "additionalProperties": False,
}
FIELDS: dict[str, Any] = {
    "n": 2,
    "presence_penalty": 1.0,
    "frequency_penalty": 1.0,
    "logit_bias": {"5": 1.0},
    "response_format": ResponseFormat("json_object"),
    "adapter": "polite",
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [Tool(FunctionTool("f"))],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
}
"""A value for each field of Chat that an engine may refuse."""


def greedy(prompt: str, **more: Any) -> Prompt:
    return Prompt(prompt=prompt, temperature=0, **more)


class EngineContract:
    """An engine's file has a subclass, and two fixtures of the module: `llama`, the folder of the small Llama as
    transformers reads it, and `engine`, which has loaded the same in float32, with a room of 4 or more.
    """

    def test_greedy_text_equals_transformers(self, engine: LanguageEngine, llama: Path) -> None:
        for prompt in PROMPTS[:2]:
            assert start(engine, greedy(prompt), 32).wait().text() == greedy_text(llama, prompt, 32)

    def test_a_chat_is_written_with_the_models_template(self, engine: LanguageEngine, llama: Path) -> None:
        written = start(engine, Chat.of(PROMPT, temperature=0), 32).wait()

        assert written.text() == greedy_text(llama, chat_prompt(llama, PROMPT), 32)

    def test_the_text_comes_in_chunks_and_ends_once(self, engine: LanguageEngine) -> None:
        written = start(engine, greedy(PROMPT), 16).wait()

        assert len([chunk for chunk in written.chunks if chunk.text]) > 4
        assert written.reasons() == {0: "length"}
        assert [bool(chunk.usage) for chunk in written.chunks] == [False] * (len(written.chunks) - 1) + [True]
        assert written.chunks[-1].served_by
        time.sleep(0.1)
        assert written.ends == 1

    def test_the_usage_counts_the_tokens(self, engine: LanguageEngine) -> None:
        """As `count` did before the answer."""
        for request in (greedy(PROMPT), Chat.of(PROMPT, temperature=0)):
            usage = start(engine, request, 7).wait().usage

            assert (usage.prompt_tokens, usage.completion_tokens) == (engine.count(request), 7)
            assert usage.total_tokens == usage.prompt_tokens + 7

    def test_a_prompt_that_was_computed_before_is_cached(self, engine: LanguageEngine) -> None:
        prompt = "".join(f"The fox number {place} is quick. " for place in range(30))
        first, second = (start(engine, greedy(prompt + end), 4).wait().usage for end in ("Here?", "There?"))

        assert second.prompt_tokens > 200
        assert second.cached_tokens > first.cached_tokens
        assert second.cached_tokens > 100

    def test_the_answer_ends_before_a_stop_string(self, engine: LanguageEngine, llama: Path) -> None:
        """Also before one that is the end of one token and the beginning of the next."""
        text = greedy_text(llama, PROMPT, 32)
        for stop in (text[11:13], text[9:17]):
            written = start(engine, greedy(PROMPT, stop=["never seen", stop]), 32).wait()

            assert written.text() == text[: text.index(stop)]
            assert written.reasons() == {0: "stop"}

    def test_many_at_once_are_written_as_one_alone(self, engine: LanguageEngine, llama: Path) -> None:
        """More than there is room for: some wait."""
        answers = [start(engine, greedy(prompt), 24) for prompt in PROMPTS]
        texts = [answer.wait().text() for answer in answers]

        assert texts == [greedy_text(llama, prompt, 24) for prompt in PROMPTS]
        assert len(set(texts)) > 1

    def test_a_cancelled_answer_frees_its_place(self, engine: LanguageEngine, llama: Path) -> None:
        answers = [start(engine, greedy(prompt), 1_000) for prompt in PROMPTS]
        answers[0].wait_for(lambda: len(answers[0].chunks) > 2)
        for answer in answers:
            answer.cancel()
            answer.cancel()
        for answer in answers:
            answer.wait_for(lambda answer=answer: bool(answer.ends))  # type: ignore[misc]

        until(lambda: (engine.load_now().running, engine.load_now().waiting) == (0, 0))
        assert max(len(answer.chunks) for answer in answers) < 1_000
        assert start(engine, greedy(PROMPT), 8).wait().text() == greedy_text(llama, PROMPT, 8)
        assert not engine.hangs()

    def test_the_same_seed_gives_the_same_text(self, engine: LanguageEngine) -> None:
        same, again, other = (
            start(engine, Prompt(prompt=PROMPT, temperature=1.5, seed=seed), 24).wait().text() for seed in (3, 3, 4)
        )

        assert same == again
        assert same != other

    @pytest.mark.parametrize("name", list(FIELDS))
    def test_what_it_cannot_do_is_refused_by_name(self, engine: LanguageEngine, name: str) -> None:
        """And what it says it can do, it does not refuse."""
        more = {"logprobs": True} if name == "top_logprobs" else {"tools": FIELDS["tools"]} if "tool_" in name else {}
        request = Chat.of(PROMPT, **more, **{name: FIELDS[name]})
        model = LanguageModel(engine, LanguageSettings("llama", "llama.cpp", max_tokens=2))
        written = Written()
        if name in engine.supports:
            model.start(request, written)
            written.wait()
        else:
            with pytest.raises(InputError, match=f"^({name}|{'|'.join(more) or name}): the engine") as caught:
                model.start(request, written)
            assert caught.value.status == 400

    def test_every_field_is_known(self) -> None:
        assert {field.name for field in fields(Chat)} == set(FIELDS) | ALWAYS - {"prompt"}

    def test_several_answers_to_one_prompt(self, engine: LanguageEngine, llama: Path) -> None:
        _needs(engine, "n")
        written = start(engine, greedy(PROMPT, n=3), 8).wait()

        assert [written.text(index) for index in range(3)] == [greedy_text(llama, PROMPT, 8)] * 3
        assert written.reasons() == dict.fromkeys(range(3), "length")
        assert (written.usage.prompt_tokens, written.usage.completion_tokens) == (engine.count(greedy(PROMPT)), 24)

    def test_tokens_come_with_their_probabilities(self, engine: LanguageEngine) -> None:
        _needs(engine, "logprobs")
        written = start(engine, Chat.of(PROMPT, temperature=0, logprobs=True, top_logprobs=2), 6).wait()
        tokens = [token for chunk in written.chunks for token in chunk.logprobs or []]

        assert "".join(token.token for token in tokens) == written.text()
        assert all(token.logprob <= 0 and len(token.top_logprobs or []) == 2 for token in tokens)
        assert all(token.top_logprobs and token.top_logprobs[0].token == token.token for token in tokens)

    def test_the_answer_fits_the_schema(self, engine: LanguageEngine) -> None:
        """Though this model never writes JSON by itself. What holds for chats only is refused for a prompt."""
        _needs(engine, "response_format")
        form = ResponseFormat("json_schema", JsonSchema("weather", SCHEMA))
        chat = start(engine, Chat.of(PROMPT, temperature=0, response_format=form), 200).wait()
        assert json.loads(chat.text()).keys() == {"sunny"}
        assert chat.reasons() == {0: "stop"}
        prompt = Written()
        try:
            prompt.cancel = engine.start(greedy(PROMPT, response_format=form), 200, prompt)
        except InputError as error:
            refused = (error.message.partition(":")[0], error.status)
        else:
            refused = None
            assert json.loads(prompt.wait().text()).keys() == {"sunny"}
        assert refused in {None, ("response_format", 400)}

    def test_a_bias_moves_the_tokens(self, engine: LanguageEngine) -> None:
        _needs(engine, "logit_bias")
        plain = start(engine, greedy(PROMPT), 4).wait().text()
        biased = start(engine, greedy(PROMPT, logit_bias={"5": 100.0}), 4).wait().text()

        assert plain != biased
        assert len(set(biased)) == 1

    def test_the_prompt_is_echoed(self, engine: LanguageEngine, llama: Path) -> None:
        _needs(engine, "echo")

        assert start(engine, greedy(PROMPT, echo=True), 8).wait().text() == PROMPT + greedy_text(llama, PROMPT, 8)


def _needs(engine: LanguageEngine, field: str) -> None:
    if field not in engine.supports:
        pytest.skip(f"the engine refuses {field}")
