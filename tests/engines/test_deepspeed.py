"""The engine `deepspeed`: `init_inference`, on one rank, and with its matrices cut over two."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.engines.contract import PROMPT, EngineContract, greedy
from tests.engines.loaded import loaded
from tests.engines.written import start
from tests.tiny_llama import greedy_text, make_llama
from torchserve_dag import InputError
from torchserve_dag.runtime.models.language.ranks.engine import RankedEngine

INSTALL = "pip install --no-build-isolation 'torchserve-dag[deepspeed]'"
pytest.importorskip("deepspeed", reason=f"DeepSpeed is not installed: {INSTALL}")

SLOW = {"token_s": 120}
"""Ranks that share two busy cores wait long for each other."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def llama(weights: Path) -> Path:
    return make_llama(weights / "llama")


@pytest.fixture(scope="module")
def engine(weights: Path, llama: Path) -> Iterator[RankedEngine]:
    with loaded(weights, llama.name, "deepspeed", options={"ranks": 2, **SLOW}) as engine:
        assert isinstance(engine, RankedEngine)
        yield engine


class TestTwoRanks(EngineContract):
    test_a_prompt_that_was_computed_before_is_cached = None  # it keeps none


def test_an_answer_fails_when_a_rank_is_killed_and_the_next_one_does_not(engine: RankedEngine) -> None:
    assert engine._ranks
    before = engine._ranks.pids
    written = start(engine, greedy(PROMPT), 1_900)
    written.wait_for(lambda: bool(written.chunks))
    os.kill(before[1], signal.SIGKILL)
    with pytest.raises(InputError, match="ended while it wrote this answer"):
        written.wait()

    start(engine, greedy(PROMPT), 3).wait()
    assert not any(psutil.pid_exists(pid) for pid in before)


def test_one_rank_writes_the_same_tokens(weights: Path, llama: Path) -> None:
    with loaded(weights, llama.name, "deepspeed", options={"ranks": 1}) as engine:
        assert start(engine, greedy(PROMPT), 16).wait().text() == greedy_text(llama, PROMPT, 16)


def test_fewer_heads_than_ranks_are_refused_with_a_sentence(weights: Path, llama: Path) -> None:
    refused = pytest.raises(ValueError, match="2 heads of keys and values: they cannot be shared by 3 ranks")
    with refused, loaded(weights, llama.name, "deepspeed", options={"ranks": 3}):
        pass
