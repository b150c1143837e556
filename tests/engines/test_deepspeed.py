"""The engine `deepspeed`: `init_inference`, on one rank, and with its matrices cut over two."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.engines.talk import Written, load, wait_until, write
from tests.tiny_llama import chat_prompt, greedy_text, make_llama
from torchserve_dag.runtime.messages import Chat, InputError, Prompt
from torchserve_dag.runtime.models.language.model import LanguageModel

INSTALL = "pip install --no-build-isolation 'torchserve-dag[deepspeed]'"
pytest.importorskip("deepspeed", reason=f"DeepSpeed is not installed: {INSTALL}")

PROMPT = "What is the capital of France?"
SLOW = {"token_s": 120}
"""Ranks that share two busy cores wait long for each other."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    make_llama(folder / "llama")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[LanguageModel]:
    model = load(folder, "llama", "deepspeed", options={"ranks": 2, **SLOW})
    yield model
    model.close()


def prompt(most: int = 32, **sampling: object) -> Prompt:
    return Prompt(prompt=PROMPT, max_tokens=most, **{"temperature": 0, **sampling})  # type: ignore[arg-type]


def test_two_ranks_write_the_tokens_that_the_whole_model_writes(model: LanguageModel, folder: Path) -> None:
    written = write(model, prompt())

    assert written.text == greedy_text(folder / "llama", PROMPT)
    assert len(written.chunks) == 32 + 1
    assert written.last.finish_reason == "length"
    assert written.last.usage is not None
    assert written.last.usage.completion_tokens == 32
    assert written.last.served_by == "deepspeed/llama"


def test_an_answer_fails_when_a_rank_is_killed_and_the_next_one_does_not(model: LanguageModel) -> None:
    before = model.engine._ranks.pids  # type: ignore[attr-defined]
    written = Written()
    model.start(prompt(most=1900), written)
    wait_until(lambda: written.chunks)
    os.kill(before[1], signal.SIGKILL)

    assert isinstance(written.wait().error, InputError)
    assert written.error.status == 507
    assert write(model, prompt(most=3)).error is None
    assert not any(psutil.pid_exists(pid) for pid in before)


def test_one_rank_writes_them_too(folder: Path) -> None:
    model = load(folder, "llama", "deepspeed", options={"ranks": 1})
    try:
        chat = Chat.of("Hello there", max_tokens=16, temperature=0)

        assert write(model, chat).text == greedy_text(
            folder / "llama", chat_prompt(folder / "llama", "Hello there"), 16
        )
    finally:
        model.close()


def test_drawn_tokens_are_the_same_on_both_ranks_and_for_the_same_seed(model: LanguageModel, folder: Path) -> None:
    one, same = (write(model, prompt(temperature=1.5, seed=1)) for _ in range(2))

    assert one.error is None
    assert one.text == same.text != greedy_text(folder / "llama", PROMPT)


def test_a_stop_string_ends_the_answer_on_both_ranks(model: LanguageModel, folder: Path) -> None:
    text = greedy_text(folder / "llama", PROMPT)
    written = write(model, prompt(stop=text[10:14], most=1000))

    assert written.text == text[: text.index(text[10:14])]
    assert written.last.finish_reason == "stop"
    assert write(model, prompt(most=2)).error is None


def test_a_cancelled_answer_gives_its_place_to_the_next(model: LanguageModel) -> None:
    long = Written()
    cancel = model.start(prompt(most=1900), long)
    wait_until(lambda: long.chunks)
    cancel()

    assert write(model, prompt(most=2)).error is None
    assert long.ended.is_set()


def test_heads_that_cannot_be_shared_are_refused_with_a_sentence(folder: Path) -> None:
    with pytest.raises(ValueError, match="2 heads of keys and values: they cannot be shared by 3 ranks"):
        load(folder, "llama", "deepspeed", options={"ranks": 3})
