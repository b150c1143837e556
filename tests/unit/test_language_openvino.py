"""The engine `openvino`, against transformers, on a small Llama in 32 bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.contract import PROMPT, PROMPTS, EngineContract, greedy
from tests.engines.written import Written, start
from tests.tiny_llama import chat_prompt, greedy_text, make_adapter, make_draft, make_gguf, make_ir, make_llama
from torchserve_dag import Chat, InputError, JsonSchema, Prompt, ResponseFormat
from torchserve_dag.runtime.compute.placement import Placement
from torchserve_dag.runtime.models.language.json_schema import check_schema
from torchserve_dag.runtime.models.language.model import LanguageModel, TokenBudget
from torchserve_dag.runtime.models.language.openvino.engine import OpenVinoEngine
from torchserve_dag.runtime.models.language.openvino.lora import read_adapter
from torchserve_dag.runtime.models.language.settings import LanguageSettings

FOX = "The quick brown fox jumps over the lazy dog. " * 6
CPU = Placement(torch.device("cpu"))


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
        ({"properties": {"a": False}}, "schema.properties.a: no value fits false"),
        ({"anyOf": [{"$ref": "#"}]}, "schema: a $ref leads back to itself before any value"),
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
    monkeypatch.setattr(
        "torchserve_dag.runtime.models.language.openvino.generation_config.check_schema", lambda _: None
    )
    wrong = ResponseFormat("json_schema", JsonSchema("it", {"type": "objecty"}))
    bad = start(engine, Chat.of("Fill it in.", response_format=wrong))

    for one in (bad, running):
        with pytest.raises(RuntimeError, match="starts again"):
            one.wait()
    assert start(engine, greedy("The fox")).wait().text() == greedy_text(llama, "The fox", 16)
    engine.close()


def test_an_engine_that_cannot_start_again_says_so(weights: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's process is ended then, and another started."""
    engine = load(weights)
    assert not engine.hangs()

    def gone() -> None:
        raise ValueError("the file is gone")

    monkeypatch.setattr(engine, "_load", gone)
    monkeypatch.setattr(engine, "_step", gone)
    with pytest.raises(RuntimeError, match="starts again"):
        start(engine, greedy("The fox")).wait()
    engine._thread.join(30)
    assert engine.hangs()
    with pytest.raises(InputError, match="closing"):
        start(engine, greedy("The fox"))


def test_a_long_idle_time_does_not_pass_for_a_step_that_hangs(
    engine: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that hangs is replaced: the first request after a quiet hour must not have it ended."""
    step, seen = engine._step, []

    def seen_step() -> None:
        seen.append(engine.hangs())
        step()

    monkeypatch.setattr(engine, "_step", seen_step)
    engine._stepped -= 3600
    start(engine, greedy("The fox")).wait()

    assert seen
    assert not any(seen)


def test_tokens_in_progress_are_bounded(engine: OpenVinoEngine) -> None:
    """One request more than fits is refused at once; what another had reserved is free again after it."""
    model = LanguageModel(engine, LanguageSettings("whole/llama.gguf", engine="openvino", tokens_in_flight=700))
    prompt = Prompt(prompt="It goes on ", max_tokens=600, temperature=0)
    release = model.reserve(prompt)

    with pytest.raises(InputError) as raised:
        model.reserve(prompt)
    assert (raised.value.status, raised.value.type) == (429, "Overloaded")
    release()
    release()
    model.reserve(prompt)()


def test_one_client_leaves_an_eighth_of_the_tokens_to_others() -> None:
    budget = TokenBudget(800)
    releases = [budget.reserve(100, "busy") for _ in range(7)]

    with pytest.raises(InputError, match="700 of the 700 tokens that one client may have") as raised:
        budget.reserve(1, "busy")
    assert raised.value.status == 429
    budget.reserve(100, "other")
    with pytest.raises(InputError, match="800 of 800 tokens are in flight"):
        budget.reserve(1, "third")
    for release in releases:
        release()
    budget.reserve(100, "busy")
    assert TokenBudget(10).reserve(50, "alone")


def test_a_prompt_is_no_longer_than_the_context(engine: OpenVinoEngine) -> None:
    model = LanguageModel(engine, LanguageSettings("whole/llama.gguf", engine="openvino"))

    for prompt in ("x " * 3000, "x" * 1_000_000):
        with pytest.raises(InputError) as raised:
            model.start(Prompt(prompt=prompt), None)  # type: ignore[arg-type]
        assert raised.value.status == 413


def test_a_model_that_is_not_there_is_named(weights: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no none\.gguf"):
        load(weights, model="none.gguf")


@pytest.fixture(scope="module")
def ir(weights: Path, llama: Path) -> str:
    """The Llama as OpenVINO IR, beside its draft, and beside two adapters."""
    make_ir(weights / "ir", llama)
    make_ir(weights / "draft_ir", make_draft(weights / "draft", llama))
    for seed, name in enumerate(("pirate", "poet"), 1):
        make_adapter(weights / name, llama, seed=seed)
    return "ir"


@pytest.fixture(scope="module")
def drafted(weights: Path, ir: str) -> Iterator[OpenVinoEngine]:
    engine = load(weights, model=ir, draft="draft_ir", draft_tokens=3, threads=1)
    yield engine
    engine.close()


def test_an_ir_folder_gives_transformers_text(weights: Path, llama: Path, ir: str) -> None:
    engine = load(weights, model=ir)
    chat = start(engine, Chat.of(PROMPT, temperature=0), 32)
    texts = [start(engine, greedy(prompt), 32).wait().text() for prompt in PROMPTS[:2]]
    engine.close()

    assert texts == [greedy_text(llama, prompt, 32) for prompt in PROMPTS[:2]]
    assert chat.wait().text() == greedy_text(llama, chat_prompt(llama, PROMPT), 32)


def test_a_draft_model_changes_no_token(drafted: OpenVinoEngine, llama: Path) -> None:
    """Of several answers at once, some of which are drawn, some cancelled; in fewer steps than there are tokens."""
    before = drafted.steps
    start(drafted, greedy(PROMPT), 32).wait()
    steps = drafted.steps - before
    drawn = start(drafted, Prompt(prompt=PROMPT, temperature=1.5), 32)
    cancelled = start(drafted, greedy(PROMPT), 500)
    texts = [start(drafted, greedy(prompt), 32) for prompt in PROMPTS[:4]]
    cancelled.cancel()

    assert [text.wait().text() for text in texts] == [greedy_text(llama, prompt, 32) for prompt in PROMPTS[:4]]
    assert drawn.wait().text()
    assert steps < 32


def test_a_seed_is_refused_where_a_draft_model_would_make_it_void(drafted: OpenVinoEngine) -> None:
    with pytest.raises(InputError, match=r"^seed: with a draft model"):
        start(drafted, Prompt(prompt=PROMPT, temperature=1.5, seed=3))
    assert start(drafted, greedy(PROMPT, seed=3)).wait().text()


def test_an_adapter_changes_its_own_answers_and_no_others(weights: Path, llama: Path, ir: str) -> None:
    """Side by side, twice, so that nothing of an adapter is left in what another answer is computed with."""
    settings = {"model": ir, "engine": "openvino", "exact": True, "context": 2048, "threads": 1}
    adapters = {"pirate": "pirate", "poet": "poet"}
    model = LanguageModel.load(weights, LanguageSettings(**settings, adapters=adapters), CPU)
    names = [None, "pirate", "poet"] * 2
    answers = []
    for name in names:
        answers.append(Written())
        model.start(greedy(PROMPT, adapter=name, max_tokens=32), answers[-1])
    texts = [answer.wait().text() for answer in answers]
    unknown = Written()
    model.start(greedy(PROMPT, adapter="parrot"), unknown)
    with pytest.raises(InputError, match=r"there is no adapter parrot; known: pirate, poet\.") as raised:
        unknown.wait()
    model.close()

    assert texts == [greedy_text(llama, PROMPT, 32, weights / name if name else None) for name in names]
    assert len(set(texts)) == 3
    assert raised.value.status == 404


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"draft": "whole"},
            "reads a draft model as a folder of OpenVINO IR, with its tokenizer: there is no openvino_model",
        ),
        ({"adapters": {"a": "none"}}, "there is no none/adapter_model.safetensors in .*, for the adapter a"),
        ({"adapters": {"a": "pirate"}, "model": "whole/llama.gguf"}, "to OpenVINO IR only, and llama.gguf is none"),
        (
            {"adapters": {"a": "pirate"}, "model": "draft_ir"},
            "a does not fit the model: it has no place for .*layers.2",
        ),
    ],
)
def test_what_openvino_would_leave_out_is_refused(
    weights: Path, ir: str, settings: dict[str, Any], sentence: str
) -> None:
    """It loads an adapter that does not fit, and computes without it."""
    whole = {"model": ir, "engine": "openvino"} | settings

    with pytest.raises(ValueError, match=sentence):
        LanguageModel.load(weights, LanguageSettings(**whole), CPU)


@pytest.mark.parametrize("key", ["use_dora", "alpha_pattern"])
def test_an_adapter_of_more_than_two_matrices_is_refused(weights: Path, ir: str, tmp_path: Path, key: str) -> None:
    config = json.loads((weights / "pirate" / "adapter_config.json").read_text())
    (tmp_path / "ir").symlink_to(weights / ir)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "adapter_model.safetensors").symlink_to(weights / "pirate" / "adapter_model.safetensors")
    (tmp_path / "odd" / "adapter_config.json").write_text(json.dumps(config | {key: {"v_proj": 4}}))

    with pytest.raises(ValueError, match=f"the adapter odd has {key}, which"):
        read_adapter(tmp_path, LanguageSettings("ir", adapters={"odd": "odd"}), "odd")
