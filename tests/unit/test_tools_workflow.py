"""A model that has functions called: by a scripted model for what it may want, and by a real engine that it answers."""

from __future__ import annotations

import enum
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from tests.scripted_model import ROOT, copy_workflows, script, scripted_project
from tests.tiny_llama import make_gguf, make_llama
from torchserve_dag import (
    Chat,
    ChatMessage,
    Failure,
    FunctionCall,
    InputError,
    TextChunk,
    Tool,
    ToolCall,
    Usage,
    Workflow,
    call_tool,
    tool_of,
)
from torchserve_dag.archives.signature import signature
from torchserve_dag.pictures.mermaid import mermaid
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.messages import FunctionTool
from torchserve_dag.runtime.project.folders import Project

LLAMA = """
name: text_generation
version: "1.0"
settings: {engine: openvino, model: gguf/llama.gguf, exact: true, context: 2048, temperature: 0}
card: {does: It writes., input: A chat., output: A text., limits: A test., weights: []}
"""
HANGING = '''

def hang(seconds: float) -> str:
    """Hangs."""
    import time
    time.sleep(seconds)
    return "woke up"


TOOLS = (calculate, day_of_week, hang)
_TOLD = [tool_of(function) for function in TOOLS]
'''


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workflow]:
    folder = scripted_project(tmp_path_factory.mktemp("project"), "tools", "tools_round")
    path = folder / "workflows" / "tools_round.py"
    path.write_text(path.read_text() + HANGING)
    path = folder / "workflows" / "tools_round.yaml"
    path.write_text(path.read_text().replace("timeout_s: 10", "timeout_s: 0.5"))
    with Workflow.load(folder / "workflows" / "tools.yaml") as workflow:
        yield workflow


def calls(*wanted: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"calls": list(wanted), **more}


class TestRounds:
    def test_a_model_that_calls_nothing_answers(self, workflow: Workflow) -> None:
        (answer,) = workflow([script([{"text": "Good day."}])])

        assert answer == TextChunk("Good day.", finish_reason="stop", usage=Usage.of(100, 10), served_by="scripted")

    def test_calls_are_made_and_the_answer_pays_for_all_rounds(self, workflow: Workflow) -> None:
        before = workflow.counts()["dialogue/call"].items
        said = [
            calls(("calculate", '{"expression": "12 * (3 + 4)"}'), ("day_of_week", '{"day": "2026-11-27"}')),
            {"text": "84, on a Friday."},
        ]
        (answer,) = workflow([script(said)])

        assert (answer.text, answer.usage) == ("84, on a Friday.", Usage.of(200, 20))
        assert workflow.counts()["dialogue/call"].items - before == 2  # each is an item, with a span of its own

    def test_the_model_gets_its_tools_their_results_and_what_is_left_of_its_tokens(self, workflow: Workflow) -> None:
        said = [calls(("calculate", '{"expression": "1 + 1"}'), ("weather", "{}"), tokens=70), {"echo": True}]
        (answer,) = workflow([script(said, max_tokens=100)])

        assert json.loads(answer.text) == {
            "max_tokens": 30,
            "tools": ["calculate", "day_of_week", "hang"],
            "results": [
                ["c0", "2.0"],
                ["c1", "Error: There is no tool 'weather'; known: calculate, day_of_week, hang"],
            ],
        }

    def test_rounds_are_bounded(self, workflow: Workflow) -> None:
        (failure,) = workflow([script([calls(("calculate", '{"expression": "1"}'))])])

        assert isinstance(failure, Failure)
        assert failure.status == 422
        assert failure.message == "The model has not answered after 4 rounds of calls: ask for less at a time."

    def test_tokens_of_all_rounds_together_are_bounded(self, workflow: Workflow) -> None:
        """The second round had 30 of 100 tokens left, and used them up."""
        said = [
            calls(("calculate", '{"expression": "1"}'), tokens=70),
            calls(("calculate", '{"expression": "1"}'), text="So", tokens=30),
        ]
        (answer,) = workflow([script(said, max_tokens=100)])

        assert (answer.text, answer.finish_reason, answer.usage.completion_tokens) == ("So", "length", 100)

    def test_a_call_that_hangs_is_cut_and_the_model_is_told(self, workflow: Workflow) -> None:
        began = time.monotonic()
        (answer,) = workflow([script([calls(("hang", '{"seconds": 20}')), {"echo": True}])])

        assert json.loads(answer.text)["results"] == [["c0", "Error: hang did not answer in time."]]
        assert time.monotonic() - began < 15

    @pytest.mark.parametrize(
        ("more", "name"),
        [({"tools": [Tool(FunctionTool("f"))]}, "tools"), ({"tool_choice": "auto"}, "tool_choice"), ({"n": 2}, "n")],
    )
    def test_tools_of_the_clients_are_refused(self, workflow: Workflow, more: dict[str, Any], name: str) -> None:
        (failure,) = workflow([script([{"text": "Hello"}], **more)])

        assert failure.status == 400
        assert failure.message.startswith(f"{name}: ")

    def test_it_is_a_chat_model_of_openais_api(self, workflow: Workflow) -> None:
        assert signature(workflow.graph)["language"] == ["chat"]


def test_a_real_engine_answers(tmp_path: Path) -> None:
    for name in ("handlers", "workflows", "weights"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "handlers" / "text_generation.py", tmp_path / "handlers")
    (tmp_path / "handlers" / "text_generation.yaml").write_text(LLAMA)
    copy_workflows(tmp_path, "tools", "tools_round")
    make_gguf(tmp_path / "weights" / "gguf", make_llama(tmp_path / "llama"), half=True)
    with Workflow.load(tmp_path / "workflows" / "tools.yaml") as workflow:
        (answer,) = workflow([Chat.of("What is 3 + 4?", max_tokens=12)])

    assert isinstance(answer, TextChunk)
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 12)


class Size(enum.Enum):
    SMALL = "small"
    LARGE = "large"


@dataclass(frozen=True)
class Place:
    name: str
    floor: int = 0


def book(
    place: Place,
    days: list[int],
    size: Size = Size.SMALL,
    note: str | None = None,
    kind: Annotated[Literal["room", "desk"], "What is booked."] = "room",
    *,
    prices: dict[str, float] | None = None,
) -> str | Place | float:
    """Books a place.

    For whole days.
    """
    if note == "give":
        return place
    if note == "endless":
        return float("inf")
    if note == "long":
        return "x" * 20_000
    if note == "refuse":
        raise InputError("It is booked already.")
    if note == "raise":
        raise RuntimeError("the password is 1234")
    return f"{place.name} {place.floor} {days} {size.value} {kind} {prices}"


def call(arguments: Any, name: str = "book") -> str:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    message = call_tool([book], ToolCall(FunctionCall(name, text), "c1"))
    assert message == ChatMessage("tool", message.text, tool_call_id="c1")
    return message.text


PLACE = {"place": {"name": "Attic"}, "days": [1]}


class TestFunctions:
    def test_what_a_model_is_told_comes_from_signature_and_docstring(self) -> None:
        told = tool_of(book).function

        assert (told.name, told.description) == ("book", "Books a place.\n\nFor whole days.")
        assert told.parameters == {
            "type": "object",
            "properties": {
                "place": {"type": "object", "properties": {"name": {"type": "string"}, "floor": {"type": "integer"}}, "required": ["name"], "additionalProperties": False},
                "days": {"type": "array", "items": {"type": "integer"}},
                "size": {"enum": ["small", "large"]},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "kind": {"enum": ["room", "desk"], "description": "What is booked."},
                "prices": {"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]},
            },
            "required": ["place", "days"],
            "additionalProperties": False,
        }  # fmt: skip

    def test_arguments_come_as_their_types(self) -> None:
        said = {**PLACE, "size": "large", "kind": "desk", "prices": {"a": 1}}

        assert call(PLACE) == "Attic 0 [1] small room None"
        assert call(said) == "Attic 0 [1] large desk {'a': 1.0}"

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ("{", "Error: The arguments of book are not JSON: "),
            ("[]", "Error: The arguments of book are a JSON object with place, days, size, note, kind, prices."),
            ({}, "Error: book needs place and days."),
            ({**PLACE, "day": 1}, "Error: book has no parameter 'day'; did you mean \"days\"?."),
            ({**PLACE, "days": ["a"]}, "Error: book: days[0]: expected a whole number, not 'a'."),
            ({**PLACE, "place": {"nam": "A"}}, 'Error: book: place.nam: unknown key "nam".'),
            ({**PLACE, "size": "huge"}, "Error: book: size: expected Size ('small', 'large'), not 'huge'."),
            ({**PLACE, "note": "refuse"}, "Error: It is booked already."),
            ({**PLACE, "note": "raise"}, "Error: book failed (RuntimeError)."),
            ({**PLACE, "note": "endless"}, "Error: book failed: it is inf, which JSON does not have."),
        ],
    )
    def test_what_does_not_fit_or_fails_is_told_in_a_sentence(self, arguments: Any, sentence: str) -> None:
        assert call(arguments).startswith(sentence)

    def test_results_are_text_or_json_and_bounded(self) -> None:
        assert json.loads(call({**PLACE, "note": "give"})) == {"name": "Attic", "floor": 0}
        assert call({**PLACE, "note": "long"}).endswith("x … and 4,000 characters more")

    def test_a_tool_that_is_not_there_is_told(self) -> None:
        assert call(PLACE, "boook") == "Error: There is no tool 'boook'; did you mean \"book\"?"

    def test_what_no_model_can_call_is_refused(self) -> None:
        def silent(a: int) -> int:
            return a

        def untyped(a) -> int:
            """It has a docstring."""
            return a

        def several(*a: int) -> int:
            """It has a docstring."""
            return sum(a)

        def strange(a: set[int]) -> int:
            """It has a docstring."""
            return len(a)

        for function, sentence in (
            (silent, "silent has no docstring"),
            (untyped, "untyped: the parameter a has no type"),
            (several, "several: the parameter a cannot be given by its name"),
            (strange, r"strange: the parameter a: no model can write a set\[int\]"),
        ):
            with pytest.raises(TypeError, match=sentence):
                tool_of(function)


@pytest.mark.parametrize(
    ("name", "argument", "result"),
    [
        ("calculate", "2 * (3 + 4) / -7", "-2.0"),
        ("calculate", "1 / 0", "Error: It divides by zero."),
        ("calculate", "9 ** 9", "Error: Write numbers, + - * / and parentheses."),
        ("calculate", "__import__('os')", "Error: Write numbers, + - * / and parentheses."),
        ("calculate", "(" * 300, "Error: The expression has more than 200 characters."),
        ("calculate", "1e308 * 1e308", "Error: calculate failed: it is inf, which JSON does not have."),
        ("day_of_week", "2026-11-27", "Friday"),
        ("day_of_week", "tomorrow", "Error: Write the date like 2026-11-27."),
    ],
)
def test_the_projects_tools_stand_what_models_write(workflow: Workflow, name: str, argument: str, result: str) -> None:
    functions = {function.__name__: function for function in _functions(workflow)}
    parameter = {"calculate": "expression", "day_of_week": "day"}[name]
    arguments = json.dumps({parameter: argument})

    assert call_tool([functions[name]], ToolCall(FunctionCall(name, arguments))).text == result


def test_a_span_names_the_function_and_nothing_that_the_model_made_up(workflow: Workflow) -> None:
    node = _call_node(workflow)
    names = [
        node(ToolCall(FunctionCall(name, "{}"))).span_attributes()["gen_ai.tool.name"]
        for name in ("calculate", "My secret")
    ]

    assert names == ["calculate", "unknown"]


def _functions(workflow: Workflow) -> Any:
    """The functions of the loaded project."""
    return _call_node(workflow).__globals__["TOOLS"]


def _call_node(workflow: Workflow) -> Any:
    inner = workflow.graph.nodes["dialogue"].code.kind.graph  # type: ignore[attr-defined]
    return inner.nodes["call"].code.kind.function


def test_the_page_shows_the_workflow() -> None:
    picture = mermaid(read_graph(Project(ROOT), ROOT / "workflows" / "tools.yaml"))

    assert f"```mermaid\n{picture}```" in (ROOT / "docs" / "tools.md").read_text("utf-8")
