"""The engine `onnxruntime`: a model exported by our own command, computed by onnxruntime-genai."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.engines.contract import PROMPT, EngineContract, greedy
from tests.engines.loaded import loaded
from tests.engines.written import start, until
from tests.tiny_llama import greedy_text, make_llama
from torchserve_dag import Chat, InputError, LanguageSettings, Placement
from torchserve_dag.commands import app
from torchserve_dag.runtime.messages import JsonSchema, OverloadedError, ResponseFormat
from torchserve_dag.runtime.models.language.answer import WAITING
from torchserve_dag.runtime.models.language.engine import LanguageEngine
from torchserve_dag.runtime.models.language.onnxruntime import engine as onnxruntime
from torchserve_dag.runtime.models.language.onnxruntime import export as onnx_export

for package in ("onnxruntime_genai", "onnxscript"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'torchserve-dag[onnxruntime]'")

ROOM = 4
LONG = 1_900
"""Tokens of an answer that does not end during a test."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = tmp_path_factory.mktemp("project")
    for folder in ("handlers", "workflows"):
        (project / folder).mkdir()
    return project


@pytest.fixture(scope="module")
def llama(project: Path) -> Path:
    """The small Llama, and beside it what the command has exported."""
    llama = make_llama(project / "weights" / "llama")
    result = CliRunner().invoke(app, ["export", "llama", "--project", str(project)])
    assert result.exit_code == 0, result.output
    assert "wrote weights/llama-onnx" in result.output
    return llama


@pytest.fixture(scope="module")
def engine(llama: Path) -> Iterator[LanguageEngine]:
    with loaded(llama.parent, "llama-onnx", "onnxruntime", prefill_tokens=8, room=ROOM, threads=1) as engine:
        yield engine


class TestOnnxruntime(EngineContract):
    """The prompts are computed in pieces of 8 tokens."""

    test_a_prompt_that_was_computed_before_is_cached = None  # it keeps none


def test_a_short_answer_is_written_beside_a_long_one(engine: LanguageEngine, llama: Path) -> None:
    long = start(engine, greedy(PROMPT), LONG)
    long.wait_for(lambda: bool(long.chunks))

    assert start(engine, greedy("Hello"), 16).wait().text() == greedy_text(llama, "Hello", 16)
    assert not long.ends
    long.cancel()
    long.wait()


def test_a_schema_that_cannot_be_followed_fails_its_own_request_only(engine: LanguageEngine) -> None:
    form = ResponseFormat("json_schema", JsonSchema("broken", {"type": "nonsense"}))
    bad = start(engine, Chat.of(PROMPT, response_format=form))
    good = start(engine, greedy(PROMPT), 2)

    with pytest.raises(InputError, match="response_format"):
        bad.wait()
    good.wait()


def test_so_many_answers_wait_and_one_more_is_refused(engine: LanguageEngine) -> None:
    running = [start(engine, greedy(PROMPT), LONG) for _ in range(ROOM)]
    until(lambda: engine.load_now().running == ROOM)
    waiting = [start(engine, greedy(PROMPT), 1) for _ in range(WAITING)]

    assert engine.load_now().waiting == WAITING
    with pytest.raises(OverloadedError):
        start(engine, greedy(PROMPT), 1)
    for written in (*waiting, *running):
        written.cancel()
    for written in (*waiting, *running):
        written.wait()


def test_a_closed_engine_fails_what_was_in_progress(llama: Path) -> None:
    with loaded(llama.parent, "llama-onnx", "onnxruntime", room=1) as engine:
        answers = [start(engine, greedy(PROMPT), LONG) for _ in range(2)]

    for answer in answers:
        with pytest.raises(OverloadedError):
            answer.wait()
    with pytest.raises(OverloadedError):
        start(engine, greedy(PROMPT))


@pytest.mark.parametrize(
    ("name", "settings", "what"),
    [
        ("llama", {}, "torchserve-dag export llama llama-onnx"),
        ("llama-onnx", {"adapters": {"a": "b"}}, "adapters"),
        ("llama-onnx", {"draft": "llama"}, "draft"),
        ("llama-onnx", {"options": {"x": 1}}, "options"),
        ("nothing", {}, "no such folder"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_a_sentence(
    llama: Path, name: str, settings: dict[str, Any], what: str
) -> None:
    with pytest.raises(ValueError, match=what), loaded(llama.parent, name, "onnxruntime", **settings):
        pass


def test_a_gpu_is_refused_with_a_sentence(llama: Path) -> None:
    settings = LanguageSettings("llama-onnx", engine="onnxruntime")
    with pytest.raises(ValueError, match="computes on the CPU"):
        onnxruntime.load(llama.parent, settings, Placement(torch.device("cuda")))


@pytest.mark.parametrize(
    ("model", "target", "what"),
    [("nothing", "new", "no config.json"), ("llama", "llama-onnx", "it exists already")],
)
def test_the_command_refuses_with_a_sentence(project: Path, llama: Path, model: str, target: str, what: str) -> None:
    result = CliRunner().invoke(app, ["export", model, target, "--project", str(project)])

    assert result.exit_code == 1
    assert what in " ".join(result.output.split())


def test_an_export_that_writes_other_tokens_is_not_kept(
    llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Here the exporter writes the graph of another model."""

    def wrong(_model: object, file: Path) -> None:
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copy(llama.with_name("llama-onnx") / name, file.with_name(name))

    monkeypatch.setattr(onnx_export, "_write_graph", wrong)
    other = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        other.model.embed_tokens.weight.copy_(other.model.embed_tokens.weight.roll(1, 0))
    other.save_pretrained(tmp_path / "other")
    for file in llama.glob("*token*"):
        shutil.copy(file, tmp_path / "other")

    with pytest.raises(ValueError, match="it cannot be exported"):
        onnx_export.export(tmp_path / "other", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
