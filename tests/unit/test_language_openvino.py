"""The engine `openvino`, against transformers, on a small Llama in 32 bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.contract import EngineContract, greedy
from tests.engines.written import Written, start
from tests.tiny_llama import greedy_text, make_gguf, make_llama
from torchserve_dag import Chat, InputError, JsonSchema, Prompt, ResponseFormat
from torchserve_dag.runtime.models.language.json_schema import check_schema
from torchserve_dag.runtime.models.language.model import LanguageModel
from torchserve_dag.runtime.models.language.openvino.engine import OpenVinoEngine
from torchserve_dag.runtime.models.language.settings import LanguageSettings

FOX = "The quick brown fox jumps over the lazy dog. " * 6


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def llama(weights: Path) -> Path:
    folder = make_llama(weights / "llama")
    make_gguf(weights / "whole", folder, half=True)
    return folder


def load(weights: Path, **settings: Any) -> OpenVinoEngine:
    defaults = {"model": "whole/llama.gguf", "engine": "openvino", "exact": True, "context": 2048}
    return OpenVinoEngine(weights, LanguageSettings(**defaults | settings))


@pytest.fixture(scope="module")
def engine(weights: Path, llama: Path) -> Iterator[OpenVinoEngine]:
    engine = load(weights)
    yield engine
    engine.close()


class TestOpenVino(EngineContract):
    def test_a_prompt_that_was_computed_before_is_cached(self, engine: OpenVinoEngine) -> None:  # type: ignore[override]
        """OpenVINO does not say how many tokens were; so the steps until the first token are counted."""
        prompt = "".join(f"The fox number {place} is quick. " for place in range(60))
        steps = []
        for end in ("Here?", "There?"):
            before = engine.steps
            start(engine, greedy(prompt + end), 1).wait()
            steps.append(engine.steps - before)

        assert engine.count(greedy(prompt)) > 3 * 128
        assert steps[0] >= 4
        assert steps[1] == 1

    def test_tokens_come_with_their_probabilities(self, engine: OpenVinoEngine) -> None:  # type: ignore[override]
        """Those of the chosen tokens; OpenVINO does not give the others."""
        written = start(engine, Chat.of("Fox?", temperature=0, logprobs=True), 6).wait()
        tokens = [token for chunk in written.chunks for token in chunk.logprobs or []]

        assert "".join(token.token for token in tokens) == written.text()
        assert all(token.logprob < 0 and token.top_logprobs is None for token in tokens)


def test_a_prompt_that_goes_on_with_a_running_one_is_answered_as_if_alone(engine: OpenVinoEngine, llama: Path) -> None:
    """OpenVINO's prefix cache would share the block that is being written into."""
    prompts = [f"{FOX}1", *(f"{FOX}1{digit}" for digit in range(8))]
    alone = [greedy_text(llama, prompt, 16) for prompt in prompts]

    for order in (1, -1):
        for _ in range(3):
            running = [start(engine, greedy(prompt)) for prompt in prompts[::order]]
            assert [one.wait().text() for one in running] == alone[::order]


def test_an_answer_holds_to_its_schema(engine: OpenVinoEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}, "ready": {"type": "boolean"}},
        "required": ["size", "ready"],
        "additionalProperties": False,
    }
    wanted = ResponseFormat("json_schema", JsonSchema("it", schema))

    answer = start(engine, Chat.of("Fill it in.", response_format=wanted, temperature=0), 200).wait().text()

    assert json.loads(answer).keys() == {"size", "ready"}


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({"type": "objecty"}, "schema.type: there is no type 'objecty'"),
        ({"type": "object", "properties": {"a": {"format": "date"}}}, "schema.properties.a.format: an answer cannot"),
        ({"$ref": "#/$defs/none"}, "schema.$ref: there is no '#/$defs/none'"),
        ({"type": "object", "required": ["a"]}, "schema.required: there is no property 'a'"),
        ({"type": "array", "maxItems": 10**9}, "schema.maxItems: write a whole number"),
        ({"anyOf": [{"enum": []}]}, "schema.anyOf[0].enum: write a list"),
        ({"items": 5}, "schema.items: a schema is an object"),
    ],
)
def test_a_schema_that_cannot_be_held_to_is_refused_by_name(
    engine: OpenVinoEngine, schema: dict[str, Any], what: str
) -> None:
    """Before OpenVINO sees it: one that its grammar cannot read would end its pipeline."""
    chat = Chat.of("Fill it in.", response_format=ResponseFormat("json_schema", JsonSchema("it", schema)))

    with pytest.raises(InputError) as raised:
        start(engine, chat)
    assert what in raised.value.message


def test_a_schema_may_contain_itself_and_may_not_be_nested_for_ever() -> None:
    check_schema({"type": "object", "properties": {"next": {"$ref": "#"}}})
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"items": deep}

    with pytest.raises(InputError, match="nested more than"):
        check_schema(deep)


def test_an_engine_that_raises_starts_again(weights: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schema that OpenVINO cannot read, had it not been refused: those in progress fail, those after do not."""
    engine = load(weights)
    running = start(engine, greedy("It goes on "), 500)
    running.wait_for(lambda: bool(running.chunks))
    monkeypatch.setattr("torchserve_dag.runtime.models.language.openvino.engine.check_schema", lambda _: None)
    wrong = ResponseFormat("json_schema", JsonSchema("it", {"type": "objecty"}))
    bad = start(engine, Chat.of("Fill it in.", response_format=wrong))

    for one in (bad, running):
        with pytest.raises(RuntimeError, match="starts again"):
            one.wait()
    assert start(engine, greedy("The fox")).wait().text() == greedy_text(llama, "The fox", 16)
    engine.close()


def test_tokens_in_progress_are_bounded(engine: OpenVinoEngine) -> None:
    """One request more than fits is refused at once; what a cancelled one had reserved is free again."""
    model = LanguageModel(engine, LanguageSettings("whole/llama.gguf", engine="openvino", tokens_in_flight=700))
    prompt = Prompt(prompt="It goes on ", max_tokens=600, temperature=0)
    cancel = model.start(prompt, Written())

    with pytest.raises(InputError) as raised:
        model.start(prompt, Written())
    assert (raised.value.status, raised.value.type) == (429, "Overloaded")
    cancel()
    model.start(prompt, Written())()


def test_a_prompt_is_no_longer_than_the_context(engine: OpenVinoEngine) -> None:
    model = LanguageModel(engine, LanguageSettings("whole/llama.gguf", engine="openvino"))

    for prompt in ("x " * 3000, "x" * 1_000_000):
        with pytest.raises(InputError) as raised:
            model.start(Prompt(prompt=prompt), None)  # type: ignore[arg-type]
        assert raised.value.status == 413


def test_a_model_that_is_not_there_is_named(weights: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no none\.gguf"):
        load(weights, model="none.gguf")
