"""The engine `pipeline`: a model cut over two processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from tests.engines.talk import Written, load, wait_until, write
from tests.tiny_llama import chat_prompt, greedy_text, make_llama
from torchserve_dag.runtime.messages import Chat, InputError, OverloadedError, Prompt
from torchserve_dag.runtime.models.language.answer import WAITING
from torchserve_dag.runtime.models.language.model import LanguageModel
from torchserve_dag.runtime.models.language.ranks.pipeline import KINDS, check, cut

PROMPT = "What is the capital of France? " * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    make_llama(folder / "llama")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[LanguageModel]:
    model = load(folder, "llama", "pipeline", prefill_tokens=8)
    yield model
    model.close()


def prompt(text: str = PROMPT, most: int = 32, **sampling: object) -> Prompt:
    return Prompt(prompt=text, max_tokens=most, **{"temperature": 0, **sampling})  # type: ignore[arg-type]


def pids(model: LanguageModel) -> list[int]:
    return model.engine._ranks.pids  # type: ignore[attr-defined]


def test_it_writes_the_tokens_that_the_whole_model_writes(model: LanguageModel, folder: Path) -> None:
    """The prompt goes through the stages in five pieces and a rest."""
    written = write(model, prompt())

    assert written.text == greedy_text(folder / "llama", PROMPT)
    assert written.last.finish_reason == "length"
    assert written.last.usage is not None
    assert written.last.usage.completion_tokens == 32
    assert written.last.served_by == "pipeline/llama"


def test_each_token_comes_as_a_chunk(model: LanguageModel) -> None:
    assert len(write(model, prompt()).chunks) == 32 + 1


def test_a_chat_is_written_by_the_models_template(model: LanguageModel, folder: Path) -> None:
    written = write(model, Chat.of("Hello there", max_tokens=16, temperature=0))

    assert written.text == greedy_text(folder / "llama", chat_prompt(folder / "llama", "Hello there"), 16)


def test_a_stop_string_ends_the_answer_before_it(model: LanguageModel, folder: Path) -> None:
    text = greedy_text(folder / "llama", PROMPT)
    written = write(model, prompt(stop=text[20:24], most=1000))

    assert written.text == text[: text.index(text[20:24])]
    assert written.last.finish_reason == "stop"
    assert written.last.usage is not None
    assert written.last.usage.completion_tokens < 40


def test_the_same_seed_gives_the_same_answer(model: LanguageModel, folder: Path) -> None:
    one, same, other = (write(model, prompt(temperature=1.5, seed=seed)).text for seed in (1, 1, 2))

    assert one == same
    assert one != other
    assert one != greedy_text(folder / "llama", PROMPT)


def test_a_cancelled_answer_gives_its_place_to_the_next(model: LanguageModel) -> None:
    long = Written()
    cancel = model.start(prompt(most=1900), long)
    wait_until(lambda: len(long.chunks) > 3)
    cancel()
    next_one = write(model, prompt(most=2))

    assert long.ended.is_set()
    assert long.last.usage is not None
    assert long.last.usage.completion_tokens < 1900
    assert next_one.last.finish_reason == "length"


def test_an_answer_that_waits_can_be_cancelled(model: LanguageModel) -> None:
    long, waiting = Written(), Written()
    cancel_long = model.start(prompt(most=1900), long)
    cancel = model.start(prompt(most=2), waiting)
    cancel()

    assert not long.ended.is_set()
    assert waiting.wait().text == ""
    cancel_long()
    cancel_long()
    long.wait()


def test_so_many_answers_wait_and_one_more_is_refused(folder: Path, model: LanguageModel) -> None:
    long = Written()
    engine = model.engine
    cancels = [engine.start(prompt(most=1900), 1900, long)]
    wait_until(lambda: long.chunks)
    cancels += [engine.start(prompt(most=1), 1, Written()) for _ in range(WAITING)]

    assert (engine.load_now().running, engine.load_now().waiting) == (1, WAITING)
    with pytest.raises(OverloadedError):
        engine.start(prompt(most=1), 1, Written())
    for cancel in reversed(cancels):
        cancel()
    long.wait()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_answer_fails_when_a_rank_is_killed_and_the_next_one_does_not(model: LanguageModel, rank: int) -> None:
    before = pids(model)
    written = Written()
    model.start(prompt(most=1900), written)
    wait_until(lambda: written.chunks)
    os.kill(before[rank], signal.SIGKILL)
    error = written.wait().error

    assert isinstance(error, InputError)
    assert error.status == 507
    assert "ended while it wrote this answer" in error.message
    assert write(model, prompt(most=3)).error is None
    assert not set(before) & set(pids(model))
    assert not any(psutil.pid_exists(pid) for pid in before)


def test_a_rank_that_ends_between_two_answers_is_started_again(model: LanguageModel) -> None:
    before = pids(model)
    os.kill(before[1], signal.SIGKILL)
    wait_until(lambda: pids(model) != before)

    assert write(model, prompt(most=3)).error is None


@pytest.mark.parametrize("rank", [0, 1])
def test_an_answer_fails_within_its_limit_when_a_rank_hangs(folder: Path, rank: int) -> None:
    model = load(folder, "llama", "pipeline", options={"token_s": 20})
    try:
        before = pids(model)
        written = Written()
        model.start(prompt(most=1900), written)
        wait_until(lambda: written.chunks)
        os.kill(before[rank], signal.SIGSTOP)
        error = written.wait().error

        assert isinstance(error, InputError)
        assert error.status == 504
        assert "no token within 20 s" in error.message
        assert write(model, prompt(most=3)).error is None
        assert not any(psutil.pid_exists(pid) for pid in before)
    finally:
        model.close()


def test_the_ranks_end_with_a_worker_that_is_killed(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.engines.talk import load\n"
        f"model = load(Path({str(folder)!r}), 'llama', 'pipeline')\n"
        "print(*model.engine._ranks.pids, flush=True); sys.stdin.read()"
    )
    worker = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin
    assert worker.stdout
    with worker.stdin, worker.stdout:
        started = [int(pid) for pid in worker.stdout.readline().split()]
        worker.kill()
        worker.wait()

    assert len(started) == 2
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in started))


def test_a_closed_model_has_no_process_and_fails_what_was_in_progress(folder: Path) -> None:
    model = load(folder, "llama", "pipeline")
    started = pids(model)
    written, waiting = Written(), Written()
    model.start(prompt(most=1000), written)
    model.start(prompt(most=1), waiting)
    model.close()

    assert isinstance(written.wait().error, OverloadedError)
    assert isinstance(waiting.wait().error, OverloadedError)
    assert not any(psutil.pid_exists(pid) for pid in started)
    with pytest.raises(OverloadedError):
        model.start(prompt(), Written())


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"options": {"ranks": 5}}, "4 layers: they cannot be cut over 5 ranks"),
        ({"options": {"ranks": 1}}, "4 layers: they cannot be cut over 1 ranks"),
        ({"options": {"ranks": 0}}, "1 to 64"),
        ({"options": {"rank": 2}}, "knows ranks, token_s and start_s"),
        ({"adapters": {"a": "b"}}, "adapters"),
        ({"draft": "llama"}, "draft"),
        ({"context": 4096}, "trained with 2,048 tokens"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_a_sentence(folder: Path, settings: dict, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        load(folder, "llama", "pipeline", **settings)


def test_what_it_cannot_do_is_refused_by_the_fields_name(model: LanguageModel) -> None:
    for field, value in (("n", 2), ("presence_penalty", 1.0), ("logprobs", 3), ("adapter", "a")):
        with pytest.raises(InputError, match=field):
            model.start(prompt(**{field: value}), Written())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_three_parts_compute_what_the_whole_model_computes(tmp_path: Path, kind: str, *, tied: bool) -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(3, 60, (1, 20))
    parts = [cut(tmp_path, rank, 3, torch.float32) for rank in range(3)]
    caches = [DynamicCache(config=part.config) for part in parts]
    with torch.inference_mode():
        wanted = whole(tokens).logits
        for piece in (tokens[:, :9], tokens[:, 9:]):
            hidden = parts[0].model(input_ids=piece, past_key_values=caches[0], use_cache=True).last_hidden_state
            for part, cache in zip(parts[1:], caches[1:], strict=True):
                out = part.model(inputs_embeds=hidden, past_key_values=cache, use_cache=True)
                hidden = out.last_hidden_state
        logits = parts[-1].lm_head(hidden)

    torch.testing.assert_close(logits, wanted[:, 9:], atol=1e-5, rtol=1e-4)


def test_a_model_that_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["gpt2"](n_layer=4, n_embd=32, n_head=2, vocab_size=64)
    config.save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="is a gpt2; what can be cut is llama"):
        check(tmp_path, 2)
