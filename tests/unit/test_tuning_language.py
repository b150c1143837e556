"""`tune` for a language model: the settings with which it writes fastest, while long prompts hold nobody up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.tiny_llama import make_gguf, make_llama
from torchserve_dag.commands import app
from torchserve_dag.tuning.language_search import LanguageTrial, best_language, cache_gb, search_language
from torchserve_dag.tuning.language_trial import LanguageMeasured, LanguageTask, measure
from torchserve_dag.tuning.search import TrialError

HANDLERS = Path(__file__).parents[2] / "handlers"
TASK = LanguageTask("", "", {"model": "m", "room": 16}, 1.0)
CARD = "card: {does: It writes., input: A chat., output: Text., limits: It is small., weights: []}\n"
OTHER = """
from torchserve_dag import ContinuousHandler, Reply, Text


class Other(ContinuousHandler[Text, Text]):
    def start(self, item: Text, reply: Reply[Text]):
        reply.end()
"""


def machine(settings: dict[str, Any]) -> LanguageMeasured:
    """On it one thread is best, 8 places are as good as 32, and 256 tokens of a prompt make long pauses."""
    prefill, room, threads = settings.get("prefill_tokens", 128), settings.get("room", 16), settings.get("threads") or 2
    rate = 100.0 * {8: 1.0, 16: 1.01, 32: 1.02}[room] / threads
    return LanguageMeasured(1.0, {"1": 10.0, "16": rate}, 5.0, 2_000, 100_000 / prefill, float(prefill), 50_000)


def searched(gap_ms: float, measured: Callable[[dict[str, Any]], LanguageMeasured] = machine) -> list[LanguageTrial]:
    return list(search_language(TASK, cores=2, gap_ms=gap_ms, measure=lambda task: measured(task.settings)))


def test_the_fastest_without_long_pauses_wins() -> None:
    trials = searched(200.0)
    best = best_language(trials, 200.0)

    assert trials[0].settings == TASK.settings
    assert {key: best.setting(key) for key in ("prefill_tokens", "threads", "room")} == {
        "prefill_tokens": 128, "threads": 1, "room": 16,
    }  # fmt: skip
    assert len(trials) < 12


def test_the_pause_that_is_tolerated_is_the_users_choice() -> None:
    """Where none is short enough, that with the shortest pauses wins."""
    chosen = {gap: best_language(searched(gap), gap).setting("prefill_tokens") for gap in (600.0, 64.0, 1.0)}

    assert chosen == {600.0: 512, 64.0: 64, 1.0: 32}


def test_a_trial_that_fails_is_shown_and_left_out() -> None:
    def measured(settings: dict[str, Any]) -> LanguageMeasured:
        if settings.get("threads") == 1:
            raise TrialError("out of memory")
        return machine(settings)

    trials = searched(200.0, measured)

    assert [trial.failed for trial in trials if trial.failed] == ["out of memory"]
    assert best_language(trials, 200.0).setting("threads") is None


@pytest.mark.parametrize(
    ("settings", "memory_gb", "gb"),
    [
        ({"room": 16, "context": 8192}, 64.0, 3),
        ({"room": 16, "context": 8192, "cache_gb": 2.0}, 64.0, 6),
        ({"room": 16, "context": 8192}, 4.0, 2),
        ({"room": 16, "tokens_in_flight": 9_000}, 64.0, 1),
    ],
)
def test_the_cache_holds_what_may_be_in_progress(settings: dict[str, Any], memory_gb: float, gb: int) -> None:
    """At most half of the memory. A cache of 2 GB that holds 50,000 tokens has to be larger than one of 1 GB."""
    trial = LanguageTrial(settings, machine({}))

    assert cache_gb(trial, memory_gb) == gb
    assert cache_gb(replace(trial, measured=replace(machine({}), cache_tokens=None)), memory_gb) is None


@pytest.fixture
def language(tmp_path: Path) -> Path:
    """A project with the small Llama."""
    (tmp_path / "handlers").mkdir()
    shutil.copy(HANDLERS / "text_generation.py", tmp_path / "handlers" / "writer.py")
    settings = "settings:\n  model: llama.gguf\n  engine: openvino   # on a CPU\n  exact: true\n  context: 2048\n"
    (tmp_path / "handlers" / "writer.yaml").write_text(f'name: writer\nversion: "1.0"\n{CARD}{settings}')
    make_gguf(tmp_path / "weights", make_llama(tmp_path / "llama"), half=True)
    return tmp_path


def test_a_trial_measures_the_real_engine(language: Path) -> None:
    """The cache of 1 GB has 4,096 bytes a token: 4 layers, 2 heads of 64 keys and 64 values in 32 bits."""
    file = language / "handlers" / "writer.yaml"
    settings = yaml.safe_load(file.read_text())["settings"]

    found = measure(LanguageTask(str(language), str(file), settings, 0.1))

    assert list(found.tokens_per_s) == ["1", "4", "16", "32"]
    assert min(*found.tokens_per_s.values(), found.first_ms, found.long_first_ms, found.gap_ms) > 0
    assert 1_000 < found.long_prompt_tokens < 2_048
    assert found.cache_tokens == pytest.approx(2**30 / 4_096, rel=0.1)


def test_the_command_writes_what_is_best_into_the_settings(language: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says what it would write, where it is not to."""
    in_process = "torchserve_dag.tuning.language_search._in_own_process"
    monkeypatch.setattr(in_process, lambda task: machine(task.settings))
    file = language / "handlers" / "writer.yaml"
    before = file.read_text()
    words = ["tune", "writer", "--project", str(language), "--pause", "600"]

    dry = CliRunner().invoke(app, [*words, "--dry-run"])
    assert "prefill_tokens: 512" in dry.stdout
    assert file.read_text() == before
    done = CliRunner().invoke(app, words)

    assert done.exit_code == 0, done.stderr
    settings = yaml.safe_load(file.read_text())["settings"]
    assert (settings["prefill_tokens"], settings["context"]) == (512, 2048)
    assert "  engine: openvino   # on a CPU\n" in file.read_text()
    assert "run" not in yaml.safe_load(file.read_text())


def test_what_cannot_be_tuned_is_said(language: Path) -> None:
    handlers = language / "handlers"
    (handlers / "other.py").write_text(OTHER)
    (handlers / "other.yaml").write_text(f'name: other\nversion: "1.0"\n{CARD}')
    remote = "settings:\n  model: m\n  engine: remote\n  remote:\n    url: https://api.example.com/v1\n"
    (handlers / "away.yaml").write_text(f'name: away\nversion: "1.0"\ncode: writer.py\n{CARD}{remote}')

    for name, sentence in (("other", "whose settings only its author knows"), ("away", "computed by another server")):
        done = CliRunner().invoke(app, ["tune", name, "--project", str(language)])
        assert done.exit_code == 1
        assert sentence in " ".join(done.stderr.split())
