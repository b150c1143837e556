"""The engine `pipeline`: a model cut over two processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from tests.engines.contract import PROMPT, EngineContract, greedy
from tests.engines.loaded import loaded
from tests.engines.written import Written, start, until
from tests.tiny_llama import make_llama
from torchserve_dag import InputError, Prompt
from torchserve_dag.runtime.messages import OverloadedError
from torchserve_dag.runtime.models.language.answer import WAITING
from torchserve_dag.runtime.models.language.ranks.engine import RankedEngine
from torchserve_dag.runtime.models.language.ranks.pipeline import KINDS, check, cut

LONG = 1_900
"""Tokens of an answer that does not end during a test."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def llama(weights: Path) -> Path:
    return make_llama(weights / "llama")


@pytest.fixture(scope="module")
def engine(weights: Path, llama: Path) -> Iterator[RankedEngine]:
    with loaded(weights, llama.name, "pipeline", prefill_tokens=8) as engine:
        assert isinstance(engine, RankedEngine)
        yield engine


def pids(engine: RankedEngine) -> list[int]:
    assert engine._ranks
    return engine._ranks.pids


def failure(written: Written) -> InputError:
    with pytest.raises(InputError) as caught:
        written.wait()
    return caught.value


class TestPipeline(EngineContract):
    """The prompts go through the stages in pieces of 8 tokens and a rest."""

    test_a_prompt_that_was_computed_before_is_cached = None  # it keeps none


def test_an_answer_that_waits_can_be_cancelled(engine: RankedEngine) -> None:
    long = start(engine, greedy(PROMPT), LONG)
    waiting = start(engine, greedy(PROMPT), 2)
    waiting.cancel()

    assert waiting.wait().text() == ""
    assert not long.ends
    long.cancel()
    long.wait()


def test_so_many_answers_wait_and_one_more_is_refused(engine: RankedEngine) -> None:
    long = start(engine, greedy(PROMPT), LONG)
    long.wait_for(lambda: bool(long.chunks))
    waiting = [start(engine, greedy(PROMPT), 1) for _ in range(WAITING)]

    assert (engine.load_now().running, engine.load_now().waiting) == (1, WAITING)
    with pytest.raises(OverloadedError):
        start(engine, greedy(PROMPT), 1)
    for written in (*waiting, long):
        written.cancel()
    long.wait()


def test_what_a_client_sends_does_not_end_the_ranks(engine: RankedEngine) -> None:
    before = pids(engine)
    for extreme in ({"temperature": 1e-30}, {"temperature": 1}, {"temperature": 2, "top_p": 1e-30}, {"seed": -(2**80)}):
        start(engine, Prompt(prompt=PROMPT, **extreme), 2).wait()
    for id_ in ("384", "9" * 30):
        with pytest.raises(InputError, match="logit_bias: the model has no token"):
            start(engine, greedy(PROMPT, logit_bias={id_: 1.0}), 2)
    with pytest.raises(InputError, match="too many"):
        engine.count(greedy("x" * 1_000_000))

    assert pids(engine) == before


@pytest.mark.parametrize("rank", [0, 1])
def test_an_answer_fails_when_a_rank_is_killed_and_the_next_one_does_not(engine: RankedEngine, rank: int) -> None:
    before = pids(engine)
    written = start(engine, greedy(PROMPT), LONG)
    written.wait_for(lambda: bool(written.chunks))
    following = start(engine, greedy(PROMPT), 3)
    os.kill(before[rank], signal.SIGKILL)
    error = failure(written)

    assert (error.status, error.type) == (507, "WorkerDied")
    assert "ended while it wrote this answer" in error.message
    assert following.wait().reasons() == {0: "length"}
    assert not set(before) & set(pids(engine))
    assert not any(psutil.pid_exists(pid) for pid in before)


def test_a_rank_that_ends_between_two_answers_is_started_again(engine: RankedEngine) -> None:
    before = pids(engine)
    os.kill(before[1], signal.SIGKILL)
    until(lambda: pids(engine) != before)

    start(engine, greedy(PROMPT), 3).wait()


def test_an_answer_fails_within_its_limit_when_a_rank_hangs(weights: Path, llama: Path) -> None:
    with loaded(weights, llama.name, "pipeline", options={"token_s": 20}) as engine:
        assert isinstance(engine, RankedEngine)
        for rank in (0, 1):
            before = pids(engine)
            written = start(engine, greedy(PROMPT), LONG)
            written.wait_for(lambda written=written: bool(written.chunks))  # type: ignore[misc]
            os.kill(before[rank], signal.SIGSTOP)
            error = failure(written)

            assert (error.status, error.type) == (504, "Timeout")
            assert "no token within 20 s" in error.message
            start(engine, greedy(PROMPT), 3).wait()
            assert not any(psutil.pid_exists(pid) for pid in before)


def test_the_ranks_end_with_a_worker_that_is_killed(weights: Path, llama: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.engines.loaded import loaded\n"
        f"with loaded(Path({str(weights)!r}), {llama.name!r}, 'pipeline') as engine:\n"
        "    print(*engine._ranks.pids, flush=True); sys.stdin.read()"
    )
    worker = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin
    assert worker.stdout
    with worker.stdin, worker.stdout:
        started = [int(pid) for pid in worker.stdout.readline().split()]
        worker.kill()
        worker.wait()

    assert len(started) == 2
    until(lambda: not any(psutil.pid_exists(pid) for pid in started))


def test_a_closed_engine_has_no_process_and_fails_what_was_in_progress(weights: Path, llama: Path) -> None:
    with loaded(weights, llama.name, "pipeline") as engine:
        assert isinstance(engine, RankedEngine)
        started = pids(engine)
        answers = [start(engine, greedy(PROMPT), LONG) for _ in range(2)]

    assert [failure(answer).status for answer in answers] == [503, 503]
    assert not any(psutil.pid_exists(pid) for pid in started)
    with pytest.raises(OverloadedError):
        start(engine, greedy(PROMPT))


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
def test_settings_that_do_not_fit_are_refused_with_a_sentence(
    weights: Path, llama: Path, settings: dict[str, Any], what: str
) -> None:
    with pytest.raises(ValueError, match=what), loaded(weights, llama.name, "pipeline", **settings):
        pass


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


def test_a_file_of_another_kind_than_safetensors_is_refused(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())

    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        check(tmp_path, 2)
