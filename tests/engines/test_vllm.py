"""The engine `vllm`: its server beside this process, in the environment that `torchserve-dag add engine vllm` makes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.engines.contract import start, until
from tests.tiny_llama import chat_prompt, greedy_text, make_adapter, make_draft, make_llama
from torchserve_dag import Chat, InputError, LanguageModel, LanguageSettings, Placement, Prompt
from torchserve_dag.runtime.messages import (
    FunctionTool,
    JsonSchema,
    OverloadedError,
    ResponseFormat,
    Tool,
)
from torchserve_dag.runtime.models.language.vllm import environment as vllm_environment
from torchserve_dag.runtime.models.language.vllm import unix_http
from torchserve_dag.runtime.models.language.vllm.engine import VllmEngine

START_S = 900.0
"""For a start of vLLM on the slowest machine."""
CPU = Placement(torch.device("cpu"))
EAGER = {"enforce_eager": True}
"""Without compiling the model, which takes longer than these tests."""
FOX = "The quick brown fox"


def installed() -> bool:
    try:
        vllm_environment.interpreter("cpu")
    except ImportError:
        return False
    return True


pytestmark = [
    pytest.mark.timeout(2 * START_S),
    pytest.mark.skipif(not installed(), reason=f"vLLM is not installed: {vllm_environment.INSTALL}"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    llama = make_llama(folder / "llama")
    make_draft(folder / "draft", llama)
    make_adapter(folder / "adapter", llama)
    return folder


def load(weights: Path, **settings: Any) -> VllmEngine:
    options = EAGER | settings.pop("options", {})
    given = {"model": "llama", "engine": "vllm", "exact": True, "cache_gb": 0.2, "room": 4, "options": options}
    engine = LanguageModel.load(weights, LanguageSettings(**(given | settings)), CPU).engine
    assert isinstance(engine, VllmEngine)
    return engine


@pytest.fixture(scope="module")
def engine(weights: Path) -> Iterator[VllmEngine]:
    loaded = load(weights, adapters={"french": "adapter"}, options={"tool_call_parser": "hermes"})
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def drafted(weights: Path) -> Iterator[VllmEngine]:
    """An engine with a draft model, and without a parser of tool calls."""
    loaded = load(weights, draft="draft")
    yield loaded
    loaded.close()


def greedy(engine: VllmEngine, prompt: str = FOX, most: int = 32, **sampling: Any) -> str:
    return start(engine, Prompt(prompt=prompt, temperature=0, **sampling), most).wait().text()


def spoken(engine: VllmEngine) -> dict[str, float]:
    """What vLLM's metrics say, by the names of the series."""
    socket = engine._server.socket
    assert socket
    page = unix_http.ask(socket, "/metrics")[1].decode()
    lines = [line.rpartition(" ") for line in page.splitlines() if line.startswith("vllm:")]
    return {name.partition("{")[0]: float(value) for name, _, value in lines}


def test_greedy_text_is_that_of_transformers(engine: VllmEngine, weights: Path) -> None:
    written = start(engine, Prompt(prompt=FOX, temperature=0), 32).wait()

    assert written.text() == greedy_text(weights / "llama", FOX)
    assert written.reasons() == {0: "length"}
    assert (written.usage.prompt_tokens, written.usage.completion_tokens) == (engine.count(Prompt(prompt=FOX)), 32)
    assert written.chunks[-1].served_by == "vllm llama"
    assert len(written.chunks) > 8


def test_a_chat_has_the_models_template(engine: VllmEngine, weights: Path) -> None:
    written = start(engine, Chat.of("Who are you?", temperature=0), 32).wait()

    assert written.text() == greedy_text(weights / "llama", chat_prompt(weights / "llama", "Who are you?"))
    assert written.usage.prompt_tokens == engine.count(Chat.of("Who are you?"))


def test_answers_beside_each_other_are_those_of_one_at_a_time(engine: VllmEngine, weights: Path) -> None:
    prompts = [f"{FOX} {i}" for i in range(12)]  # three times as many as there is room for
    together = [start(engine, Prompt(prompt=prompt, temperature=0), 24) for prompt in prompts]

    assert [one.wait().text() for one in together] == [greedy_text(weights / "llama", p, 24) for p in prompts]


def test_an_adapter_is_taken_by_its_name(engine: VllmEngine, weights: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama, tokenizer = (
        AutoModelForCausalLM.from_pretrained(weights / "llama"),
        AutoTokenizer.from_pretrained(weights / "llama"),
    )
    model = PeftModel.from_pretrained(llama, weights / "adapter").eval()
    ids = tokenizer(FOX, return_tensors="pt")
    expected = tokenizer.decode(
        model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    )

    assert greedy(engine, most=24, adapter="french") == expected != greedy(engine, most=24)


def test_an_adapter_that_is_not_there_is_a_404(engine: VllmEngine) -> None:
    with pytest.raises(InputError, match='no adapter "frensh"; did you mean "french"') as refused:
        start(engine, Prompt(prompt=FOX, adapter="frensh"))

    assert refused.value.status == 404


def test_a_prompt_that_begins_like_an_earlier_one_is_read_from_the_cache(engine: VllmEngine) -> None:
    shared = "Answer in one sentence, please, and thank you. " * 8
    first = start(engine, Prompt(prompt=shared + "One.", temperature=0), 4).wait()
    second = start(engine, Prompt(prompt=shared + "Two.", temperature=0), 4).wait()

    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens >= 32
    assert second.usage.cached_tokens % 32 == 0


def test_an_answer_fits_its_schema(engine: VllmEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 5}, "warm": {"type": "boolean"}},
        "required": ["city", "warm"],
        "additionalProperties": False,
    }
    form = ResponseFormat("json_schema", JsonSchema("weather", schema))
    written = start(engine, Chat.of("Is Paris warm?", temperature=0, response_format=form), 200).wait()
    said = json.loads(written.text())

    assert said.keys() == {"city", "warm"}
    assert isinstance(said["warm"], bool)


def test_a_schema_that_cannot_be_held_to_is_refused(engine: VllmEngine) -> None:
    form = ResponseFormat("json_schema", JsonSchema("odd", {"type": "no such type"}))

    with pytest.raises(InputError) as refused:
        start(engine, Chat.of("Is Paris warm?", response_format=form)).wait()

    assert 400 <= refused.value.status < 500


def weather() -> Tool:
    parameters = {"type": "object", "properties": {"far": {"type": "boolean"}}, "required": ["far"]}
    return Tool(FunctionTool("weather", parameters=parameters | {"additionalProperties": False}))


def test_a_prescribed_tool_is_called_with_arguments_that_fit(engine: VllmEngine) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    written = start(
        engine, Chat.of("How warm is it?", tools=[weather()], tool_choice=choice, temperature=0), 200
    ).wait()
    calls = [call for chunk in written.chunks for call in chunk.tool_calls or []]

    assert {call.function.name for call in calls if call.function.name} == {"weather"}
    assert json.loads("".join(call.function.arguments or "" for call in calls)).keys() == {"far"}


def test_tools_without_a_parser_of_the_models_calls_are_refused(drafted: VllmEngine) -> None:
    with pytest.raises(InputError, match=r"tools: .* tool_call_parser"):
        start(drafted, Chat.of("How warm is it?", tools=[weather()]))

    assert start(drafted, Chat.of("Hello", tools=[weather()], tool_choice="none"), 4).wait().text()


def test_an_answer_ends_before_a_stop_string(engine: VllmEngine) -> None:
    whole = greedy(engine)
    written = start(engine, Prompt(prompt=FOX, temperature=0, stop=whole[12:16]), 32).wait()

    assert written.text() == whole[: whole.index(whole[12:16])]
    assert written.reasons() == {0: "stop"}


def test_several_answers_have_their_own_texts_and_the_same_with_the_same_seed(engine: VllmEngine) -> None:
    def answers() -> list[str]:
        written = start(engine, Prompt(prompt=FOX, n=3, temperature=1.0, top_p=0.9, seed=7), 12).wait()
        assert written.usage.completion_tokens == 36
        return [written.text(i) for i in range(3)]

    first = answers()

    assert len(set(first)) == 3
    assert answers() == first


def test_log_probabilities_come_with_their_tokens(engine: VllmEngine) -> None:
    written = start(engine, Chat.of("Hello", temperature=0, logprobs=True, top_logprobs=2), 8).wait()
    tokens = [token for chunk in written.chunks for token in chunk.logprobs or []]

    assert "".join(token.token for token in tokens) == written.text()
    assert all(len(token.top_logprobs or []) == 2 and token.logprob <= 0 for token in tokens)


@pytest.mark.parametrize(
    "sampling",
    [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"logit_bias": {"70": 100.0}}],
    ids=lambda sampling: next(iter(sampling)),
)
def test_a_setting_of_sampling_changes_the_answer(engine: VllmEngine, sampling: dict[str, Any]) -> None:
    assert greedy(engine, most=64, **sampling) != greedy(engine, most=64)


def test_the_prompt_is_repeated_where_that_is_asked_for(engine: VllmEngine) -> None:
    assert greedy(engine, echo=True) == FOX + greedy(engine)


def test_a_cancelled_answer_frees_its_place(engine: VllmEngine) -> None:
    """As many as there is room for are cancelled; one more is answered, long before they would have ended."""
    long = [start(engine, Prompt(prompt=FOX, temperature=0), 1900) for _ in range(engine.room)]
    for one in long:
        one.wait_for(lambda one=one: bool(one.chunks))
        one.cancel()

    assert greedy(engine).startswith(greedy(engine, most=4))
    until(lambda: spoken(engine)["vllm:num_requests_running"] == 0)
    assert all(len(one.chunks) < 1000 for one in long)
    assert [one.ends for one in long] == [1] * engine.room


def test_its_load_is_that_of_its_metrics(engine: VllmEngine) -> None:
    long = start(engine, Prompt(prompt=FOX, temperature=0), 1900)
    until(lambda: engine.load_now().running == 1)

    assert 0 < (engine.load_now().cache_usage or 0) < 1
    assert not engine.hangs()
    long.cancel()
    until(lambda: engine.load_now().running == 0)


def test_the_context_is_what_the_model_was_trained_with(engine: VllmEngine) -> None:
    assert engine.context == 2048


def processes(engine: VllmEngine) -> list[psutil.Process]:
    """The group's first, which this process started, and all below it."""
    pid = engine._server.pid
    assert pid
    group = psutil.Process(pid)
    return [group, *group.children(recursive=True)]


def is_server(process: psutil.Process) -> bool:
    return "vllm.entrypoints.openai.api_server" in words(process)


def is_core(process: psutil.Process) -> bool:
    return "EngineCore" in "".join(words(process))


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # it has ended meanwhile
        return []


@pytest.mark.parametrize("killed", [is_server, is_core], ids=["its server", "its engine core"])
def test_killed_in_the_middle_of_an_answer_it_fails_and_serves_again(
    engine: VllmEngine, killed: Callable[[psutil.Process], bool]
) -> None:
    before, there, socket = greedy(engine), processes(engine), engine._server.socket
    long = start(engine, Prompt(prompt=FOX, temperature=0), 1900)
    long.wait_for(lambda: len(long.chunks) > 2)
    next(process for process in there if killed(process) and process != there[0]).kill()

    with pytest.raises(OverloadedError, match="vllm ended while it wrote this answer"):
        long.wait()
    until(lambda: not any(running(process) for process in there))
    until(lambda: engine._server.socket not in {None, socket}, START_S)
    assert greedy(engine) == before


def running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_of_a_worker_that_is_killed_no_process_is_left(weights: Path) -> None:
    """By SIGKILL, while vLLM is loading: nobody is left who could end it."""
    script = f"""
        from pathlib import Path
        from tests.engines.test_vllm import load
        load(Path({str(weights)!r}))
    """
    worker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=Path(__file__).parents[2])
    this = psutil.Process(worker.pid)
    until(lambda: any(is_core(child) for child in this.children(recursive=True)), START_S)
    there = this.children(recursive=True)
    worker.send_signal(signal.SIGKILL)
    worker.wait()

    until(lambda: not any(running(process) for process in there))


def test_a_draft_model_changes_no_token(drafted: VllmEngine, weights: Path) -> None:
    assert greedy(drafted) == greedy_text(weights / "llama", FOX)
    assert spoken(drafted)["vllm:spec_decode_num_accepted_tokens_total"] > 0


def test_n_grams_change_no_token(weights: Path) -> None:
    lookup = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 4}
    engine = load(weights, options={"speculative_config": lookup})
    try:
        assert greedy(engine) == greedy_text(weights / "llama", FOX)
        assert spoken(engine)["vllm:spec_decode_num_drafts_total"] > 0
    finally:
        engine.close()


def test_two_processes_compute_a_layer_together(weights: Path) -> None:
    engine = load(weights, options={"tensor_parallel_size": 2})
    try:
        assert greedy(engine) == greedy_text(weights / "llama", FOX)
        assert sum("Worker" in "".join(words(process)) for process in processes(engine)) == 2
    finally:
        engine.close()


def test_weights_of_eight_bits_write_nearly_the_same(weights: Path) -> None:
    engine = load(weights, exact=False, options={"quantization": "int8_per_channel_weight_only"})
    try:
        assert greedy(engine)[:16] == greedy_text(weights / "llama", FOX)[:16]
    finally:
        engine.close()


def test_what_vllm_refuses_is_the_reason_why_it_is_not_loaded(weights: Path) -> None:
    with pytest.raises(ValueError, match=r"vllm does not serve llama: .*unrecognized arguments: --no-such-argument"):
        load(weights, options={"no_such_argument": 1})
