"""The engine `onnxruntime`: a model exported by our own command, computed by onnxruntime-genai."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.engines.talk import Written, load, wait_until, write
from tests.tiny_llama import chat_prompt, greedy_text, make_llama
from torchserve_dag.commands import app
from torchserve_dag.runtime.compute.placement import Placement
from torchserve_dag.runtime.messages import Chat, InputError, JsonSchema, OverloadedError, Prompt, ResponseFormat
from torchserve_dag.runtime.models.language.answer import WAITING
from torchserve_dag.runtime.models.language.model import LanguageModel
from torchserve_dag.runtime.models.language.onnxruntime import engine as onnxruntime
from torchserve_dag.runtime.models.language.settings import LanguageSettings

for package in ("onnxruntime_genai", "onnxscript"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'torchserve-dag[onnxruntime]'")

PROMPT = "What is the capital of France? " * 5
ROOM = 3
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose model has been exported by the command."""
    project = tmp_path_factory.mktemp("project")
    for folder in ("handlers", "workflows"):
        (project / folder).mkdir()
    make_llama(project / "weights" / "llama")
    result = CliRunner().invoke(app, ["export", "llama", "--project", str(project)])
    assert result.exit_code == 0, result.output
    assert "wrote weights/llama-onnx" in result.output
    return project


@pytest.fixture(scope="module")
def folder(project: Path) -> Path:
    return project / "weights"


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[LanguageModel]:
    model = load(folder, "llama-onnx", "onnxruntime", prefill_tokens=8, room=ROOM, threads=1)
    yield model
    model.close()


def prompt(text: str = PROMPT, most: int = 32, **sampling: object) -> Prompt:
    return Prompt(prompt=text, max_tokens=most, **{"temperature": 0, **sampling})  # type: ignore[arg-type]


def test_it_writes_the_tokens_that_the_model_writes_in_transformers(model: LanguageModel, folder: Path) -> None:
    """The prompt is computed in several pieces."""
    written = write(model, prompt())

    assert written.text == greedy_text(folder / "llama", PROMPT)
    assert len(written.chunks) == 32 + 1
    assert written.last.finish_reason == "length"
    assert written.last.usage is not None
    assert written.last.usage.completion_tokens == 32
    assert written.last.served_by == "onnxruntime/llama-onnx"


def test_answers_are_written_at_the_same_time_and_each_is_right(model: LanguageModel, folder: Path) -> None:
    long = Written()
    cancel = model.start(prompt(most=1900), long)
    wait_until(lambda: long.chunks)
    texts = ["The quick brown", "Hello", PROMPT, "A language model", "You are"]
    answers = [Written() for _ in texts]
    for text, answer in zip(texts, answers, strict=True):
        model.start(prompt(text), answer)
    for text, answer in zip(texts, answers, strict=True):
        assert answer.wait().text == greedy_text(folder / "llama", text)

    assert not long.ended.is_set()
    cancel()
    assert long.wait().last.usage is not None


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
    one, same, other = (write(model, prompt(temperature=1.5, seed=seed)).text for seed in (-1, -1, 2**62))

    assert one == same
    assert one != other
    assert one != greedy_text(folder / "llama", PROMPT)


def test_an_answer_holds_to_a_json_schema(model: LanguageModel) -> None:
    form = ResponseFormat("json_schema", JsonSchema("colour", SCHEMA))
    written = write(model, prompt(most=200, response_format=form))

    assert written.last.finish_reason == "stop"
    answer = json.loads(written.text)
    assert answer["colour"] in {"red", "blue"}
    assert isinstance(answer["sure"], bool)


def test_a_schema_that_cannot_be_followed_fails_its_own_request_only(model: LanguageModel) -> None:
    form = ResponseFormat("json_schema", JsonSchema("broken", {"type": "nonsense"}))
    bad, good = Written(), Written()
    model.start(prompt(response_format=form), bad)
    model.start(prompt(most=2), good)

    assert isinstance(bad.wait().error, InputError)
    assert "response_format" in bad.error.message
    assert good.wait().error is None


def test_a_cancelled_answer_gives_its_place_to_the_next(model: LanguageModel) -> None:
    answers = [Written() for _ in range(ROOM)]
    cancels = [model.start(prompt(most=1900), answer) for answer in answers]
    wait_until(lambda: all(answer.chunks for answer in answers))
    waiting = Written()
    model.start(prompt(most=2), waiting)
    cancels[0]()

    assert waiting.wait().error is None
    assert [answer.ended.is_set() for answer in answers] == [True, False, False]
    for cancel in cancels:
        cancel()
        cancel()
    for answer in answers:
        answer.wait()
    wait_until(lambda: model.load_now().running == 0)


def test_so_many_answers_wait_and_one_more_is_refused(model: LanguageModel) -> None:
    engine = model.engine
    answers = [Written() for _ in range(ROOM)]
    cancels = [engine.start(prompt(most=1900), 1900, answer) for answer in answers]
    wait_until(lambda: all(answer.chunks for answer in answers))
    cancels += [engine.start(prompt(most=1), 1, Written()) for _ in range(WAITING)]

    assert (engine.load_now().running, engine.load_now().waiting) == (ROOM, WAITING)
    with pytest.raises(OverloadedError):
        engine.start(prompt(most=1), 1, Written())
    for cancel in cancels:
        cancel()
    wait_until(lambda: engine.load_now().running == engine.load_now().waiting == 0)
    assert not engine.hangs()


def test_a_closed_model_fails_what_was_in_progress(folder: Path) -> None:
    model = load(folder, "llama-onnx", "onnxruntime", room=1)
    written, waiting = Written(), Written()
    model.start(prompt(most=1900), written)
    model.start(prompt(most=1), waiting)
    model.close()

    assert isinstance(written.wait().error, OverloadedError)
    assert isinstance(waiting.wait().error, OverloadedError)
    with pytest.raises(OverloadedError):
        model.start(prompt(), Written())


def test_what_it_cannot_do_is_refused_by_the_fields_name(model: LanguageModel) -> None:
    for field, value in (("n", 2), ("presence_penalty", 1.0), ("logprobs", 3), ("adapter", "a")):
        with pytest.raises(InputError, match=field):
            model.start(prompt(**{field: value}), Written())


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
    folder: Path, name: str, settings: dict, what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        load(folder, name, "onnxruntime", **settings)


def test_a_gpu_is_refused_with_a_sentence(folder: Path) -> None:
    with pytest.raises(ValueError, match="computes on the CPU"):
        onnxruntime.load(folder, LanguageSettings("llama-onnx", engine="onnxruntime"), Placement(torch.device("cuda")))


@pytest.mark.parametrize(
    ("model", "target", "what"),
    [("nothing", "new", "no config.json"), ("llama", "llama-onnx", "it exists already")],
)
def test_the_command_refuses_with_a_sentence(project: Path, model: str, target: str, what: str) -> None:
    result = CliRunner().invoke(app, ["export", model, target, "--project", str(project)])

    assert result.exit_code == 1
    assert what in " ".join(result.output.split())


def test_an_export_that_writes_other_tokens_is_not_kept(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Here the graph of another model, whose weights differ."""
    from torchserve_dag.runtime.models.language.onnxruntime import export as onnx_export

    def wrong(_model: object, file: Path) -> None:
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copy(project / "weights" / "llama-onnx" / name, file.with_name(name))

    monkeypatch.setattr(onnx_export, "_write_graph", wrong)
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(project / "weights" / "llama")
    with torch.no_grad():
        other.model.embed_tokens.weight.copy_(other.model.embed_tokens.weight.roll(1, 0))
    other.save_pretrained(tmp_path / "other")
    for file in (project / "weights" / "llama").glob("*token*"):
        shutil.copy(file, tmp_path / "other")

    with pytest.raises(ValueError, match="it cannot be exported"):
        onnx_export.export(tmp_path / "other", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
