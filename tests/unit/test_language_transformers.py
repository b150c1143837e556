"""The engine `transformers` on a small Llama: the tokens are those of transformers' own `generate`."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.replies import HANG_S, KeptReply, ask
from tests.tiny_llama import chat_prompt, greedy_text, make_adapter, make_draft, make_llama, make_vision_llama
from torchserve_dag import (
    Chat,
    ChatMessage,
    ContentPart,
    FunctionTool,
    ImageUrl,
    InputError,
    LanguageModel,
    LanguageSettings,
    Placement,
    Prompt,
    ResponseFormat,
    Tool,
)  # fmt: skip
from torchserve_dag.runtime.models.language.engines import load_engine_here
from torchserve_dag.runtime.models.language.transformers.batch import ContinuousBatch
from torchserve_dag.runtime.models.language.transformers.generate import GenerateThreads

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    llama = make_llama(folder / "llama")
    make_draft(folder / "draft", llama)
    make_adapter(folder / "pirate", llama)
    make_vision_llama(folder / "vision")
    return folder


def loaded(weights: Path, **settings) -> LanguageModel:
    made = LanguageSettings(**{"model": "llama", "engine": "transformers", "context": 1024} | settings)
    return LanguageModel(load_engine_here(weights, made, Placement(torch.device("cpu"))), made)


@pytest.fixture(scope="module")
def model(weights: Path) -> Iterator[LanguageModel]:
    model = loaded(weights, adapters={"pirate": "pirate"})
    yield model
    model.close()


def greedy(text: str = QUESTION, tokens: int = 32, **sampling) -> Chat:
    return Chat.of(text, max_tokens=tokens, temperature=0, **sampling)


def expected(weights: Path, text: str = QUESTION, tokens: int = 32) -> str:
    return greedy_text(weights / "llama", chat_prompt(weights / "llama", text), tokens)


def idle(model: LanguageModel) -> bool:
    """Whether all its places are free, after at most as long as only a hang takes."""
    end = time.monotonic() + HANG_S
    while time.monotonic() < end:
        load = model.load_now()
        if load.running == load.waiting == 0:
            return True
        time.sleep(0.01)
    return False


def test_the_tokens_are_those_of_generate(model: LanguageModel, weights: Path) -> None:
    reply = ask(model, greedy())

    assert isinstance(model.engine._batches[None], ContinuousBatch)
    assert reply.text() == expected(weights)
    assert reply.reason() == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (19, 32)
    assert reply.chunks[-1].served_by == "transformers llama"
    assert len([chunk for chunk in reply.chunks if chunk.text]) > 16  # streamed, token by token


def test_a_prompt_is_gone_on_with_as_it_stands(model: LanguageModel, weights: Path) -> None:
    reply = ask(model, Prompt(prompt="The quick", max_tokens=16, temperature=0, echo=True))

    assert reply.text() == "The quick" + greedy_text(weights / "llama", "The quick", 16)


def test_sixteen_at_once_get_what_they_get_one_by_one(model: LanguageModel, weights: Path) -> None:
    """Prompts and answers of different lengths, some longer than a step reads of prompts, some sampled."""
    requests = [greedy(f"{i} " * (1 + 20 * i), 8 + i) for i in range(12)]
    requests += [Chat.of("Hi", max_tokens=24, temperature=1, top_p=0.9, seed=seed) for seed in range(4)]
    alone = [ask(model, request).text() for request in requests]
    replies = [KeptReply() for _ in requests]
    for request, reply in zip(requests, replies, strict=True):
        model.start(request, reply)

    assert [reply.wait().text() for reply in replies] == alone
    assert alone[11] == expected(weights, "11 " * 221, 19)
    assert len(set(alone)) == 16
    assert idle(model)


def test_a_prefix_is_computed_once(model: LanguageModel) -> None:
    """Whole pages of 16 tokens are kept, also when their request has ended."""
    text = "The lazy dog sleeps while the fox jumps over it. " * 10
    first, second = ask(model, greedy(text + "Who?", 4)), ask(model, greedy(text + "When?", 4))

    assert first.usage.cached_tokens < 32
    assert second.usage.cached_tokens > 0.8 * second.usage.prompt_tokens
    several = ask(model, greedy(text + "Where?", 2, n=3))
    assert several.usage.cached_tokens <= several.usage.prompt_tokens


def test_cancelling_frees_the_place(model: LanguageModel) -> None:
    begun = threading.Event()
    replies = [KeptReply(lambda _: begun.set()) for _ in range(20)]  # four of them wait
    cancels = [model.start(greedy(f"Number {i}", 600), reply) for i, reply in enumerate(replies)]
    assert begun.wait(HANG_S)
    for cancel in cancels:
        cancel()
        cancel()  # twice does no harm

    assert idle(model)
    assert all(reply.reason() is None for reply in replies)
    assert model.engine._batches[None]._answers == {}
    assert ask(model, greedy(tokens=4)).reason() == "length"
    assert model.load_now().cache_usage < 1


def test_a_stop_string_ends_the_answer_and_is_not_in_it(model: LanguageModel, weights: Path) -> None:
    whole = expected(weights)
    stop = whole[17:21]
    reply = ask(model, greedy(tokens=900, stop=["never", stop]))

    assert reply.text() == whole[: whole.index(stop)]
    assert reply.reason() == "stop"
    assert reply.usage.completion_tokens < 32
    assert idle(model)


def test_a_token_that_ends_texts_ends_the_answer(weights: Path, tmp_path: Path) -> None:
    """As the model's generation config says; it is no part of the text."""
    llama = make_llama(tmp_path / "llama")
    tokens = ask_tokens(llama)
    config = json.loads((llama / "generation_config.json").read_text("utf-8"))
    (llama / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [1, tokens[5]]}), "utf-8")
    model = loaded(tmp_path)
    reply = ask(model, greedy())
    model.close()

    assert reply.text() == greedy_text(weights / "llama", chat_prompt(weights / "llama", QUESTION), 5)
    assert (reply.reason(), reply.usage.completion_tokens) == ("stop", 6)


def ask_tokens(llama: Path) -> list[int]:
    from tests.tiny_llama import greedy_tokens

    return greedy_tokens(llama, chat_prompt(llama, QUESTION), 6)


def test_a_seed_gives_its_answer_again_and_another_gives_another(model: LanguageModel) -> None:
    texts = [ask(model, Chat.of("Hi", max_tokens=16, temperature=1, seed=seed)).text() for seed in (1, 1, 2)]

    assert texts[0] == texts[1] != texts[2]


def test_without_a_seed_answers_differ(model: LanguageModel) -> None:
    assert len({ask(model, Chat.of("Hi", max_tokens=16, temperature=1)).text() for _ in range(4)}) == 4


def test_several_answers_have_their_own_index_and_one_usage(model: LanguageModel) -> None:
    reply = ask(model, Chat.of(QUESTION, n=3, max_tokens=8, temperature=1, seed=5))

    assert len({reply.text(index) for index in range(3)}) == 3
    assert {reply.reason(index) for index in range(3)} == {"length"}
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (19, 24)
    assert sum(chunk.usage is not None for chunk in reply.chunks) == 1


def test_log_probabilities_are_those_of_the_models_logits(model: LanguageModel, weights: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reply = ask(model, greedy(tokens=3, logprobs=True, top_logprobs=2))
    noted = [token for chunk in reply.chunks for token in chunk.logprobs or []]
    tokenizer = AutoTokenizer.from_pretrained(weights / "llama")
    ids = tokenizer(chat_prompt(weights / "llama", QUESTION), return_tensors="pt", add_special_tokens=False)
    logits = AutoModelForCausalLM.from_pretrained(weights / "llama", dtype=torch.float32)(**ids).logits
    wanted = logits[0, -1].log_softmax(-1).topk(2)

    assert "".join(token.token for token in noted) == reply.text()
    assert [other.logprob for other in noted[0].top_logprobs] == pytest.approx(wanted.values.tolist(), abs=1e-4)
    assert [other.token for other in noted[0].top_logprobs] == [tokenizer.decode([token]) for token in wanted.indices]


def test_a_bias_forbids_and_enforces_tokens(model: LanguageModel, weights: Path) -> None:
    token = ask_tokens(weights / "llama")[0]
    without = ask(model, greedy(tokens=8, logit_bias={str(token): -100}))
    only = ask(model, greedy(tokens=3, logit_bias={str(token): 100}))

    assert not without.text().startswith(expected(weights, tokens=1))
    assert only.text() == expected(weights, tokens=1) * 3
    with pytest.raises(InputError, match="logit_bias: the model has no token 384"):
        model.start(greedy(logit_bias={"384": 1}), KeptReply())


def test_an_adapter_changes_its_own_answers_and_no_others(model: LanguageModel, weights: Path) -> None:
    """Side by side, so that nothing of it is left in the model."""
    replies = [KeptReply() for _ in range(4)]
    for i, reply in enumerate(replies):
        model.start(greedy(adapter="pirate" if i % 2 else None), reply)
    texts = [reply.wait().text() for reply in replies]

    assert texts[0] == texts[2] == expected(weights)
    assert texts[1] == texts[3] == adapted(weights)
    assert texts[0] != texts[1]


def adapted(weights: Path) -> str:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights / "llama")
    ids = tokenizer(chat_prompt(weights / "llama", QUESTION), return_tensors="pt", add_special_tokens=False)
    base = AutoModelForCausalLM.from_pretrained(weights / "llama", dtype=torch.float32)
    written = PeftModel.from_pretrained(base, weights / "pirate").generate(**ids, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(written[0, ids["input_ids"].shape[1] :])


def test_the_weights_are_in_memory_once_for_all_adapters(model: LanguageModel) -> None:
    models = [batch._manager.model for batch in model.engine._batches.values()]
    weights = [each.model.layers[0].self_attn.q_proj.weight.data_ptr() for each in models]

    assert len(models) == 2
    assert weights[0] == weights[1]


@pytest.mark.parametrize("seed", [None, 3])
def test_a_draft_model_gives_the_same_tokens(model: LanguageModel, weights: Path, seed: int | None) -> None:
    """Also where they are drawn: a place has its own random numbers, whoever foresaw its token."""
    drafted = loaded(weights, draft="draft", draft_tokens=3)
    requests = [
        Chat.of(f"Number {i}", max_tokens=24, temperature=0 if seed is None else 0.8, seed=seed) for i in range(3)
    ]
    texts = [ask(drafted, request).text() for request in requests]
    calls = drafted.engine._batches[None]._steps
    drafted.close()

    assert texts == [ask(model, request).text() for request in requests]
    assert calls < 3 * 24  # fewer steps than tokens


def test_cancelling_ends_generate_at_its_next_token(weights: Path) -> None:
    drafted = loaded(weights, draft="draft", room=2, tokens_in_flight=10_000)
    begun = threading.Event()
    replies = [KeptReply(lambda _: begun.set()) for _ in range(6)]
    cancels = [drafted.start(greedy(f"Number {i}", 900), reply) for i, reply in enumerate(replies)]
    assert begun.wait(HANG_S)
    for cancel in cancels:
        cancel()

    assert idle(drafted)
    assert ask(drafted, greedy(tokens=4)).reason() == "length"
    drafted.close()


def test_a_model_that_cannot_be_batched_continuously_is_answered_one_by_one(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> None:
        raise ValueError("this attention cannot be paged")

    monkeypatch.setattr("torchserve_dag.runtime.models.language.transformers.engine.ContinuousBatch", cannot)
    model = loaded(weights)
    replies = [KeptReply() for _ in range(4)]
    monkeypatch.undo()
    for i, reply in enumerate(replies):
        model.start(greedy(f"Number {i}", 8), reply)

    assert isinstance(model.engine._batches[None], GenerateThreads)
    assert [reply.wait().text() for reply in replies] == [expected(weights, f"Number {i}", 8) for i in range(4)]
    model.close()


def photo(colour: str) -> ContentPart:
    file = io.BytesIO()
    Image.new("RGB", (80, 60), colour).save(file, "PNG")
    return ContentPart(
        "image_url", image_url=ImageUrl("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    )


def test_a_photo_in_a_chat_is_seen(weights: Path) -> None:
    """As by transformers' own processor and `generate`."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = loaded(weights, model="vision")
    texts = {}
    for colour in ("red", "blue"):
        parts = [photo(colour), ContentPart("text", "What is it?")]
        texts[colour] = ask(model, Chat(messages=[ChatMessage("user", parts)], max_tokens=12, temperature=0)).text()
    no_photo = ask(model, greedy(tokens=4))
    model.close()
    processor = AutoProcessor.from_pretrained(weights / "vision")
    content = [{"type": "image", "image": Image.new("RGB", (80, 60), "red")}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    reference = AutoModelForImageTextToText.from_pretrained(weights / "vision", dtype=torch.float32)
    written = reference.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]

    assert texts["red"] == processor.decode(written)
    assert texts["red"] != texts["blue"]
    assert no_photo.reason() == "length"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("data:image/png;base64,!!!", "a photo's base64 is damaged"),
        ("data:image/png,abc", "with the photo in base64"),
        ("data:image/png;base64,AAAA", "not a photo"),
    ],
)
def test_a_photo_that_cannot_be_read_is_refused(weights: Path, url: str, sentence: str) -> None:
    model = loaded(weights, model="vision")
    parts = [ContentPart("image_url", image_url=ImageUrl(url))]

    with pytest.raises(InputError, match=sentence):
        model.start(Chat(messages=[ChatMessage("user", parts)]), KeptReply())
    model.close()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (greedy(response_format=ResponseFormat("json_object")), "response_format"),
        (greedy(adapter="parrot"), "adapter"),
        (greedy(tools=[Tool(FunctionTool("weather"))], tool_choice="required"), "tool_choice"),
        (Chat(messages=[ChatMessage("user", [photo("red")])]), "messages"),
        (Prompt(prompt=""), "prompt"),
    ],
)
def test_what_it_cannot_do_is_refused_by_its_name(model: LanguageModel, request_: Chat | Prompt, field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: "):
        model.start(request_, KeptReply())

    assert idle(model)


@pytest.mark.parametrize("characters", [10_000, 1_000_000])
def test_a_prompt_beyond_the_context_is_refused(model: LanguageModel, characters: int) -> None:
    with pytest.raises(InputError, match="context") as refused:
        model.start(greedy("x " * (characters // 2)), KeptReply())

    assert refused.value.status == 413


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"cache_gb": 1e-6}, "cache_gb: 1,024 tokens of context take 0.0043 GB"),
        ({"options": {"pages": 5}}, "options: .*pages"),
        ({"context": 4096}, "was trained with 2048 tokens"),
    ],
)
def test_settings_that_do_not_fit_are_named(weights: Path, settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        loaded(weights, **settings)


def test_when_the_batch_ends_requests_fail_and_the_process_is_to_be_started_again(weights: Path) -> None:
    """For instance after a fault in a kernel: nothing waits for ever."""
    model = loaded(weights)
    begun = threading.Event()
    reply = KeptReply(lambda _: begun.set())
    model.start(greedy(tokens=900), reply)
    assert begun.wait(HANG_S)
    model.engine._batches[None]._choices.prepare_tensor_args = None  # its next step fails

    with pytest.raises(RuntimeError, match="NoneType"):
        reply.wait()
    model.engine._batches[None]._manager._generation_thread.join(HANG_S)
    assert model.hangs()
    with pytest.raises(RuntimeError, match="has ended"):
        model.start(greedy(), KeptReply())
    model.close()


def test_closing_fails_what_is_in_progress(weights: Path) -> None:
    model = loaded(weights)
    begun = threading.Event()
    reply = KeptReply(lambda _: begun.set())
    model.start(greedy(tokens=900), reply)
    assert begun.wait(HANG_S)
    model.close()

    with pytest.raises(RuntimeError):
        reply.wait()


def test_an_idle_model_does_not_hang(model: LanguageModel) -> None:
    assert idle(model)
    assert not model.hangs()
