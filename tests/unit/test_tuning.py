"""`tune` measures a handler's settings, keeps those with the same answers, and writes the fastest down."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from torchserve_dag.commands import app
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.runtime.project.handler_file import Run
from torchserve_dag.tuning.search import TrialError, best, difference, search
from torchserve_dag.tuning.trial import Measured, Task
from torchserve_dag.tuning.write import write_settings

TASK = Task("", "", Run(device="cpu"), [], 1.0)


def measured(together: float, score: float = 0.5, why_not: str = "") -> Measured:
    return Measured(1.0, 10.0, together, [{"name": "cup", "score": score}], why_not)


def rates(run: Run) -> Measured:
    """A machine on which OpenVINO is fastest, bfloat16 is not precise, and batches of 4 are best."""
    together = {"torch": 10.0, "openvino": 20.0, "compiled": 19.0}[run.runtime]
    together *= {1: 1.0, 2: 1.2, 4: 1.4, 8: 1.1, 16: 1.0}[run.batch]
    bf16 = run.precision == "bfloat16"
    return measured(together * (2 if bf16 else 1), 0.48 if bf16 else 0.501)


def test_the_fastest_with_the_same_answers_wins() -> None:
    trials = list(search(TASK, within=0.005, compiled=False, measure=lambda task: rates(task.run)))
    assert best(trials, 0.005).run == Run(device="cpu", runtime="openvino", batch=4)
    assert [trial.run.batch for trial in trials][-3:] == [2, 4, 8], "and no batch after the first that is slower"


def test_what_the_answers_may_be_off_by_is_the_users_choice() -> None:
    trials = list(search(TASK, within=0.05, compiled=False, measure=lambda task: rates(task.run)))
    assert best(trials, 0.05).run.precision == "bfloat16"


def test_a_runtime_that_fell_back_to_torch_does_not_win() -> None:
    def measure(task: Task) -> Measured:
        return replace(rates(task.run), why_not="it is not there" if task.run.runtime == "openvino" else "")

    trials = list(search(TASK, within=0.005, compiled=True, measure=measure))
    assert best(trials, 0.005).run.runtime == "compiled"


def test_a_trial_that_fails_is_shown_and_left_out() -> None:
    def measure(task: Task) -> Measured:
        if task.run.runtime == "openvino" or task.run.batch > 1:
            raise TrialError("out of memory")
        return rates(task.run)

    trials = list(search(TASK, within=0.005, compiled=False, measure=measure))
    assert best(trials, 0.005).run.runtime == "torch"
    assert [trial.failed for trial in trials if trial.failed] == ["out of memory"] * 3


def test_of_settings_that_are_about_as_fast_the_simplest_wins() -> None:
    trials = list(search(TASK, within=0.005, compiled=False, measure=lambda task: measured(10 + task.run.batch / 100)))
    assert best(trials, 0.005).run == Run(device="cpu")


@pytest.mark.parametrize(
    ("one", "other", "off"),
    [
        (0.5, 0.48, 0.02),
        (200.0, 202.0, 0.01),
        ({"a": [1, 2.0]}, {"a": [1, 2.0]}, 0.0),
        ({"a": 1.0}, {"b": 1.0}, math.inf),
        ([0.5], [0.5, 0.5], math.inf),
        ("cup", "mug", math.inf),
        (True, False, math.inf),
        (None, None, 0.0),
    ],
)
def test_the_difference_between_two_answers(one: Any, other: Any, off: float) -> None:
    assert difference(one, other) == pytest.approx(off)


def test_settings_are_written_and_the_rest_of_the_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("name: a\nrun:\n  batch: 1   # small\n  # kept\n\n  device: cpu\ncard:\n  does: it\n")
    assert len(write_settings(file, {"batch": 4, "channels_last": True}, "tuned")) == 2
    text = file.read_text()
    assert yaml.safe_load(text) == {
        "name": "a",
        "run": {"batch": 4, "channels_last": True, "device": "cpu"},
        "card": {"does": "it"},
    }
    assert "  # kept\n" in text
    assert text.count("# tuned") == 2


def test_settings_are_written_where_there_were_none(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("name: a\n")
    write_settings(file, {"runtime": "openvino"}, "tuned")
    assert yaml.safe_load(file.read_text()) == {"name": "a", "run": {"runtime": "openvino"}}


def test_settings_in_braces_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("name: a\nrun: {batch: 1}\n")
    with pytest.raises(CheckError, match=r"a\.yaml:2: run: is written in braces"):
        write_settings(file, {"batch": 2}, "tuned")


def test_the_command_says_what_is_wrong(project: Path, tmp_path: Path) -> None:
    for words, sentence in (
        (["tune", "uper"], 'there is no handler "uper"'),
        (["tune", "upper", "--item", str(tmp_path / "none")], "There is no file in"),
    ):
        done = CliRunner().invoke(app, [*words, "--project", str(project)])
        assert done.exit_code == 1
        assert sentence in done.stderr
