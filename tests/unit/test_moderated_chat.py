"""The workflow `moderated_chat` with a model that writes what it is told, and a classifier that can be held up.

The functions alone are in property/test_moderated_chat.py, the workflow with real models in contract/.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchserve_dag import Chat, ChatMessage, ContentPart, FailedError, Failure, ImageUrl, TextChunk, Usage, Workflow
from torchserve_dag.archives.signature import signature
from torchserve_dag.runtime.models.stages import Stages

ROOT = Path(__file__).parents[2]
WITHIN_S = 60
PHOTO = ContentPart("image_url", image_url=ImageUrl("data:image/png;base64,AA=="))
CARD = {"does": "It tests.", "input": "A text.", "output": "An answer.", "limits": "It is a test's.", "weights": []}
MODEL = '''
import threading
from collections.abc import Callable
from pathlib import Path

from torchserve_dag import Chat, ContinuousHandler, FunctionCall, NoSettings, Placement, Reply, TextChunk, ToolCall, Usage


class Writer(ContinuousHandler[Chat, TextChunk]):
    """Says the last message with an a for each @, in chunks of three letters; at * it waits until `go`, or until it is
    cancelled."""

    def load(self, folder: Path, settings: NoSettings, placement: Placement) -> None:
        self.go, self.cancelled, self.written = threading.Event(), threading.Event(), ""

    def example(self) -> Chat:
        return Chat.of("Hello")

    def start(self, item: Chat, reply: Reply[TextChunk]) -> Callable[[], None]:
        gone = threading.Event()

        def cancel() -> None:
            gone.set()
            self.cancelled.set()
            self.go.set()

        threading.Thread(target=self.write, args=(item.messages[-1].text.replace("@", "a"), reply, gone), daemon=True).start()
        return cancel

    def write(self, text: str, reply: Reply[TextChunk], gone: threading.Event) -> None:
        for at in range(0, len(text), 3):
            part = text[at : at + 3]
            if "*" in part:
                self.go.wait(30)
            if gone.is_set():
                return
            self.written += part
            reply.chunk(TextChunk(part))
        if text == "Call.":
            reply.chunk(TextChunk(tool_calls=[ToolCall(FunctionCall("f", "{}"), "c", "function", 0)]))
        reason = "tool_calls" if text == "Call." else "stop"
        reply.chunk(TextChunk(finish_reason=reason, usage=Usage.of(3, 7), served_by="writer"))
        reply.end()
'''
JUDGE = '''
import threading
from collections.abc import Sequence
from pathlib import Path

from torchserve_dag import Handler, Moderation, NoSettings, Placement, Text


class Judge(Handler[Text, str, bool, Moderation]):
    """Flags a text with "bad" in it. One with "late" waits until `go`; one with "dead" raises."""

    def load(self, folder: Path, settings: NoSettings, placement: Placement) -> None:
        self.go = threading.Event()

    def example(self) -> Text:
        return Text("Hello")

    def preprocess(self, item: Text) -> str:
        return item.text

    def infer(self, batch: Sequence[str]) -> list[bool]:
        if any("late" in text for text in batch):
            self.go.wait(30)
        if any("dead" in text for text in batch):
            raise ValueError("It is dead.")
        return ["bad" in text for text in batch]

    def postprocess(self, output: bool, item: Text) -> Moderation:
        return Moderation(output, {"rude": output}, {"rude": float(output)})
'''


def written(folder: Path, changes: dict[str, dict[str, Any]] | None = None) -> Path:
    """A project with the workflow as it is, but for `changes` of its nodes, and with handlers of this test."""
    for name, code in (("text_generation", MODEL), ("text_moderation", JUDGE)):
        (folder / "handlers").mkdir(exist_ok=True)
        (folder / "handlers" / f"{name}.py").write_text(code)
        card = {"name": name, "version": "1.0", "card": CARD}
        (folder / "handlers" / f"{name}.yaml").write_text(yaml.safe_dump(card))
    (folder / "workflows").mkdir()
    shutil.copy(ROOT / "workflows" / "moderated_chat.py", folder / "workflows")
    file = yaml.safe_load((ROOT / "workflows" / "moderated_chat.yaml").read_text("utf-8"))
    for node, more in (changes or {}).items():
        file["nodes"][node] |= more
    path = folder / "workflows" / "moderated_chat.yaml"
    path.write_text(yaml.safe_dump(file, sort_keys=False))
    return path


@pytest.fixture
def workflow(tmp_path: Path) -> Iterator[Workflow]:
    with Workflow.load(written(tmp_path)) as loaded:
        yield loaded


def handlers(workflow: Workflow) -> tuple[Any, Any]:
    """The model and the classifier."""
    loaded = workflow._loaded.values()
    (model,) = [one.starter.handler for one in loaded if one.own_engine]  # type: ignore[union-attr]
    (judge,) = {one.runner.handler for one in loaded if isinstance(one.runner, Stages)}
    return model, judge


def text_of(chunks: Iterable[TextChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_answer_comes_by_sentences_and_ends_as_the_models_does(workflow: Workflow) -> None:
    chunks = list(workflow.stream(Chat.of("One. Two! And three")))

    assert [chunk.text for chunk in chunks] == ["One.", " Two!", " And three"]
    assert (chunks[-1].finish_reason, chunks[-1].usage, chunks[-1].served_by) == ("stop", Usage.of(3, 7), "writer")


def test_nothing_is_released_before_the_prompts_verdict_and_the_model_writes_meanwhile(workflow: Workflow) -> None:
    model, judge = handlers(workflow)
    taken: list[TextChunk] = []
    thread = threading.Thread(target=lambda: taken.extend(workflow.stream(Chat.of("late. All of it."))))
    thread.start()
    until(lambda: model.written.endswith("All of it."))

    assert not taken
    judge.go.set()
    thread.join(WITHIN_S)
    assert text_of(taken) == "late. All of it."


def test_a_sentence_is_released_once_its_own_verdict_is_there(workflow: Workflow) -> None:
    model, judge = handlers(workflow)
    stream = workflow.stream(Chat.of("One. It is l@te. Three."))

    assert next(stream).text == "One."
    until(lambda: model.written.endswith("Three."))
    timer = threading.Timer(0.2, judge.go.set)
    timer.start()
    assert next(stream).text == " It is late."
    assert judge.go.is_set()
    assert text_of(stream) == " Three."


def test_a_flagged_sentence_stops_the_model_and_ends_the_answer(workflow: Workflow) -> None:
    model, _ = handlers(workflow)
    chunks = list(workflow.stream(Chat.of("One. That is b@d. Then * it went on and on.")))

    assert text_of(chunks) == "One."
    assert [chunk.finish_reason for chunk in chunks] == [None, "content_filter"]
    assert model.cancelled.wait(WITHIN_S)
    assert "went on" not in model.written


def test_a_flagged_prompt_is_refused_with_its_category_and_its_answer_is_stopped(workflow: Workflow) -> None:
    model, _ = handlers(workflow)
    chunks = list(workflow.stream(Chat.of("A bad one. * More.")))

    assert chunks == [TextChunk("This cannot be answered: it was flagged as rude.", finish_reason="content_filter")]
    assert "More" not in model.written


def test_what_a_complete_answer_has_cost_is_known_though_it_is_flagged(workflow: Workflow) -> None:
    """The verdict on its last sentence comes after its end."""
    chunks = list(workflow.stream(Chat.of("One. And that is b@d.")))

    assert text_of(chunks) == "One."
    assert (chunks[-1].finish_reason, chunks[-1].usage) == ("content_filter", Usage.of(3, 7))
    assert chunks[-1].served_by == "writer"


def test_calls_of_tools_are_released_with_the_end(workflow: Workflow) -> None:
    chunks = list(workflow.stream(Chat.of("Call.")))

    assert [call.function.name for chunk in chunks for call in chunk.tool_calls or ()] == ["f"]
    assert chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("say", ["One. The judge is de@d. Three.", "The judge is dead."])
def test_where_the_verdict_fails_nothing_more_is_released(workflow: Workflow, say: str) -> None:
    taken: list[TextChunk] = []

    def take() -> None:
        for chunk in workflow.stream(Chat.of(say)):
            taken.append(chunk)  # noqa: PERF402 (those before the failure count)

    with pytest.raises(FailedError) as raised:
        take()

    assert raised.value.failure.status == 500
    assert text_of(taken) in {"One.", ""}


def test_by_a_default_it_is_released_unchecked(tmp_path: Path) -> None:
    """Fail open, as docs/moderation.md has it."""
    is_open = {"on_error": {"default": {"flagged": False}}}
    with Workflow.load(written(tmp_path, {"verdict": is_open, "verdicts": is_open})) as workflow:
        assert text_of(workflow.stream(Chat.of("The judge is dead. Three."))) == "The judge is dead. Three."
        assert text_of(workflow.stream(Chat.of("One. That is b@d."))) == "One."


def test_by_a_default_that_is_flagged_the_answer_ends_in_good_order(tmp_path: Path) -> None:
    closed = {"on_error": {"default": {"flagged": True, "categories": {"unchecked": True}}}}
    with Workflow.load(written(tmp_path, {"verdict": closed, "verdicts": closed})) as workflow:
        chunks = list(workflow.stream(Chat.of("One. The judge is de@d. Three.")))
        (refused,) = workflow.stream(Chat.of("dead"))

    assert (text_of(chunks), chunks[-1].finish_reason) == ("One.", "content_filter")
    assert refused.text.endswith("it was flagged as unchecked.")


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": [ChatMessage("user", [PHOTO])]}, "messages"),
    ],
)
def test_what_could_not_be_checked_is_refused(workflow: Workflow, given: dict[str, Any], field: str) -> None:
    chat = replace(Chat.of("One."), **given)
    (failed,) = workflow([chat])

    assert isinstance(failed, Failure)
    assert (failed.status, failed.message.partition(":")[0]) == (400, field)


def test_many_chats_at_once_are_not_mixed(workflow: Workflow) -> None:
    says = [f"Number {i}. It is {'b@d' if i % 3 == 0 else 'fine'}. The end of {i}." for i in range(60)]
    answers = workflow([Chat.of(say) for say in says])

    assert [text_of(chunks) for chunks in answers] == [
        f"Number {i}." if i % 3 == 0 else say for i, say in enumerate(says)
    ]


def test_it_is_called_and_streamed_by_openais_form(workflow: Workflow) -> None:
    """What a workflow takes and gives is what makes it a model at /v1."""
    assert signature(workflow.graph)["language"] == ["chat"]
