"""An engine in a process of its own: as in the worker's, and whatever happens to that process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.contract import PROMPT, PROMPTS, greedy
from tests.engines.written import Written, start, until
from tests.tiny_llama import chat_prompt, greedy_text, make_gguf, make_llama
from torchserve_dag import Chat, InputError
from torchserve_dag.runtime.compute.placement import Placement
from torchserve_dag.runtime.messages import JsonSchema, OverloadedError, ResponseFormat
from torchserve_dag.runtime.models.language.engine_errors import EngineEndedError, EngineTimeoutError
from torchserve_dag.runtime.models.language.engines import load_engine
from torchserve_dag.runtime.models.language.model import LanguageModel
from torchserve_dag.runtime.models.language.openvino import engine as openvino
from torchserve_dag.runtime.models.language.openvino.prompts import load_prompts
from torchserve_dag.runtime.models.language.process import engine as process
from torchserve_dag.runtime.models.language.process.engine import EngineProcess
from torchserve_dag.runtime.models.language.process.messages import EngineSpec
from torchserve_dag.runtime.models.language.settings import LanguageSettings

CPU = Placement(torch.device("cpu"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def llama(weights: Path) -> Path:
    folder = make_llama(weights / "llama")
    make_gguf(weights / "whole", folder, half=True)
    return folder


def settings_of(engine: str, **more: Any) -> LanguageSettings:
    model = "whole/llama.gguf" if engine == "openvino" else "llama"
    return LanguageSettings(**{"model": model, "engine": engine, "exact": True, "context": 2048} | more)


def loaded(weights: Path, engine: str = "openvino", **more: Any) -> EngineProcess:
    found = load_engine(weights, settings_of(engine, **more), CPU)
    assert isinstance(found, EngineProcess)
    return found


@pytest.fixture(scope="module")
def engine(weights: Path, llama: Path) -> Iterator[EngineProcess]:
    engine = loaded(weights)
    yield engine
    engine.close()


def running(engine: EngineProcess) -> Written:
    """An answer that has begun, and takes long."""
    written = start(engine, greedy("It goes on "), 1_500)
    written.wait_for(lambda: len(written.chunks) > 2)
    return written


def keepers() -> int:
    """The threads that keep engines' processes alive."""
    return len([thread for thread in threading.enumerate() if thread.name.endswith(" process")])


def works_again(engine: EngineProcess, before: int | None) -> None:
    """Wait until another process answers; until then, requests are refused in a sentence."""
    refused: list[str] = []

    def answers() -> bool:
        try:
            return bool(start(engine, greedy(PROMPT), 4).wait().text())
        except OverloadedError as error:
            refused.append(error.message)
            return False

    until(answers)
    assert all("is being started again" in sentence for sentence in refused)
    assert engine.pid not in {before, None}
    assert not engine.hangs()


@pytest.mark.parametrize("name", ["openvino", "transformers"])
def test_the_text_is_that_of_the_engine_itself(weights: Path, llama: Path, name: str) -> None:
    engine = loaded(weights, name)
    chat = Chat.of(PROMPT, temperature=0)

    assert start(engine, chat, 24).wait().text() == greedy_text(llama, chat_prompt(llama, PROMPT), 24)
    answers = [start(engine, greedy(prompt), 16) for prompt in PROMPTS]
    assert [one.wait().text() for one in answers] == [greedy_text(llama, prompt, 16) for prompt in PROMPTS]
    usage = start(engine, chat, 7).wait().usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (engine.count(chat), 7)
    until(lambda: engine.load_now().running == engine.load_now().waiting == 0)
    engine.close()
    assert engine.pid is None


def test_chunks_come_while_the_engine_steps(engine: EngineProcess) -> None:
    written = running(engine)

    assert not written.ends
    assert engine.load_now().running == 1
    written.cancel()


def test_what_the_engine_refuses_fails_the_answer_with_its_sentence(engine: EngineProcess) -> None:
    wrong = ResponseFormat("json_schema", JsonSchema("it", {"type": "objecty"}))

    with pytest.raises(InputError, match="there is no type 'objecty'") as raised:
        start(engine, Chat.of("Fill it in.", response_format=wrong)).wait()
    assert (raised.value.status, raised.value.type) == (400, "InputError")


def test_a_thousand_cancelled_at_once_free_their_places(engine: EngineProcess, llama: Path) -> None:
    answers = [start(engine, greedy(f"{number} "), 1_000) for number in range(1_000)]
    answers[0].wait_for(lambda: bool(answers[0].chunks))
    for answer in answers:
        answer.cancel()
        answer.cancel()

    for answer in answers:
        with pytest.raises(InputError, match="cancelled") as raised:
            answer.wait()
        assert (raised.value.status, answer.ends) == (499, 1)
    until(lambda: engine.load_now().running == engine.load_now().waiting == 0)
    assert start(engine, greedy(PROMPT), 8).wait().text() == greedy_text(llama, PROMPT, 8)


def test_a_killed_process_fails_its_answers_and_another_takes_over(engine: EngineProcess) -> None:
    answers = [running(engine) for _ in range(3)]
    pid = engine.pid
    assert pid
    os.kill(pid, signal.SIGKILL)

    for answer in answers:
        with pytest.raises(EngineEndedError, match="another is being started") as raised:
            answer.wait()
        assert (raised.value.status, raised.value.type, answer.ends) == (507, "WorkerDied", 1)
    works_again(engine, pid)


def test_a_process_that_hangs_is_ended_and_another_takes_over(weights: Path, llama: Path) -> None:
    settings = settings_of("openvino")
    engine = EngineProcess(
        EngineSpec(openvino.__name__, weights, settings, None), lambda: load_prompts(weights, settings), 3
    )
    written, pid = running(engine), engine.pid
    assert pid
    os.kill(pid, signal.SIGSTOP)

    assert engine.count(greedy(PROMPT)) > 4  # it needs no process
    with pytest.raises(EngineTimeoutError, match="no progress") as raised:
        written.wait()
    assert (raised.value.status, raised.value.type) == (504, "Timeout")
    works_again(engine, pid)
    engine.close()


def test_a_model_that_is_gone_is_tried_again_a_few_times_and_then_needs_another_worker(
    tmp_path: Path, weights: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_gguf(tmp_path / "whole", llama, half=True)
    monkeypatch.setattr(process, "PAUSES_S", (0, 0.1, 0.1))
    engine = loaded(tmp_path)
    written = running(engine)
    (tmp_path / "whole" / "llama.gguf").unlink()
    assert engine.pid
    os.kill(engine.pid, signal.SIGKILL)

    with pytest.raises(EngineEndedError):
        written.wait()
    assert not engine.hangs()
    until(engine.hangs)
    with pytest.raises(OverloadedError):
        start(engine, greedy(PROMPT))
    engine.close()


def test_the_process_ends_with_a_worker_that_is_killed(weights: Path, llama: Path) -> None:
    program = f"""
    import sys, time
    import torch
    from pathlib import Path
    from torchserve_dag import LanguageSettings, Placement
    from torchserve_dag.runtime.models.language.engines import load_engine
    settings = LanguageSettings("whole/llama.gguf", engine="openvino", context=512)
    print(load_engine(Path({str(weights)!r}), settings, Placement(torch.device("cpu"))).pid, flush=True)
    time.sleep(600)
    """
    worker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE)
    assert worker.stdout
    pid = int(worker.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    worker.kill()
    worker.wait()
    worker.stdout.close()

    until(lambda: not Path(f"/proc/{pid}").exists(), 20)


@pytest.mark.parametrize("name", ["openvino", "transformers"])
def test_what_fails_the_loading_keeps_its_class_and_its_sentence(weights: Path, llama: Path, name: str) -> None:
    (weights / "not.gguf").write_text("no model")
    there = settings_of(name, model=str(llama), options={"pages": 5, "CACHE_PAGES": 5})
    errors, threads = [], keepers()
    for settings in (settings_of(name, model="not.gguf"), there):
        with pytest.raises((ValueError, OSError)) as raised:
            load_engine(weights, settings, CPU)
        errors.append(str(raised.value))

    assert "not.gguf" in errors[0]
    until(lambda: keepers() == threads)


def test_a_model_of_such_an_engine_counts_before_it_starts(engine: EngineProcess) -> None:
    """What is too long is refused without a word to the process."""
    model = LanguageModel(engine, settings_of("openvino"))

    with pytest.raises(InputError) as raised:
        model.reserve(greedy("x " * 3_000))
    assert raised.value.status == 413
