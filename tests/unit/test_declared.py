"""What code gives is what it declares, or its own request fails with a sentence; scalars of numpy and torch are scalars."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, Protocol, TypedDict, TypeVar

import numpy as np
import pytest
import torch

from tests.unit.conftest import CARD, IMPORTS, Write
from tests.unit.test_modules import put, unpacked
from torchserve_dag.archives.build import build
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.declared import WrongTypeError, as_declared
from torchserve_dag.runtime.data.options import OUTPUTS
from torchserve_dag.runtime.graph.torchserve.segment import FAILURE_PART, unpack
from torchserve_dag.runtime.messages import Box, DetectedObject, Failure, Label, Labels, Skipped, Text
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.telemetry.scores import score_in
from torchserve_dag.runtime.worker import service
from torchserve_dag.runtime.worker.protocol import ServiceRequest
from torchserve_dag.runtime.worker.torchserve import segments
from torchserve_dag.runtime.workflow import Workflow


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


class Named(Protocol):
    name: str


class Movie(TypedDict):
    name: str


UserId = NewType("UserId", int)
T = TypeVar("T")
LABEL = Label("a", 0.5)

GOOD: list[tuple[Any, Any, Any]] = [
    (str, "a", "a"),
    (str, np.str_("a"), "a"),
    (int, 1, 1),
    (int, Level.LOW, Level.LOW),
    (int, np.int64(1), 1),
    (int, torch.tensor(1), 1),
    (float, 1.5, 1.5),
    (float, 1, 1),
    (float, np.float32(0.5), 0.5),
    (float, np.float64(0.5), 0.5),
    (float, np.array(0.5), 0.5),
    (float, torch.tensor(0.5, requires_grad=True), 0.5),
    (float, np.int8(1), 1),
    (bool, True, True),
    (bool, np.bool_(True), True),  # noqa: FBT003
    (bool, torch.tensor(True), True),  # noqa: FBT003
    (bytes, b"a", b"a"),
    (None, None, None),
    (list[str], ["a"], ["a"]),
    (list[str], ("a",), ["a"]),
    (list, [1], [1]),
    (tuple[int, str], (1, "a"), (1, "a")),
    (tuple[int, str], [1, "a"], (1, "a")),
    (tuple[int, ...], (), ()),
    (dict[str, int], {"a": 1}, {"a": 1}),
    (Label, LABEL, LABEL),
    (Label | None, None, None),
    (int | str, np.int32(3), 3),
    (list[str] | Skipped, Skipped("a"), Skipped("a")),
    (Colour, Colour.RED, Colour.RED),
    (Literal["a", "b"], "b", "b"),
    (Sequence[int], (1, 2), (1, 2)),
    (Annotated[int, "any"], 3, 3),
    (UserId, 3, 3),
    (Movie, {"name": "a"}, {"name": "a"}),
]

WRONG: list[tuple[Any, Any, str]] = [
    (str, 1, "int, where str is declared"),
    (str, b"a", "bytes, where str is declared"),
    (str, None, "nothing, where str is declared"),
    (int, True, "bool, where int is declared"),
    (int, 1.0, "float, where int is declared"),
    (int, np.bool_(True), "numpy.bool, where int is declared"),  # noqa: FBT003
    (int, torch.tensor(0.5), "torch.Tensor, where int is declared"),
    (float, "1", "str, where float is declared"),
    (float, torch.zeros(3), "torch.Tensor of shape (3,), where float is declared"),
    (float, np.zeros(1), "numpy.ndarray of shape (1,), where float is declared"),
    (bool, 1, "int, where bool is declared"),
    (list[str], "abc", "str, where list[str] is declared"),
    (list[float], np.zeros(2), "numpy.ndarray of shape (2,), where list[float] is declared"),
    (list[str], (letter for letter in "abc"), "generator, where list[str] is declared"),
    (tuple[int, str], (1,), "tuple, where tuple[int, str] is declared"),
    (dict[str, int], [("a", 1)], "list, where dict[str, int] is declared"),
    (Label, Labels([LABEL]), "Labels, where Label is declared"),
    (Label, {"name": "a", "score": 1.0}, "dict, where Label is declared"),
    (Label, Label, "the type Label, where Label is declared"),
    (Label | None, "a", "str, where Label | nothing is declared"),
    (int | str, 1.5, "float, where int | str is declared"),
    (Colour, "red", "str, where Colour is declared"),
    (Literal["a", "b"], "c", "str, where 'a' or 'b' is declared"),
    (UserId, "3", "str, where UserId is declared"),
    (None, Text(""), "Text, where nothing is declared"),
]


@pytest.mark.parametrize(("kind", "value", "given"), GOOD)
def test_a_value_of_the_declared_type_passes(kind: Any, value: Any, given: Any) -> None:
    check = as_declared(kind, "size")

    assert check
    assert check(value) == given
    assert type(check(value)) is type(given) or isinstance(value, float | str)


@pytest.mark.parametrize(("kind", "value", "what"), WRONG)
def test_a_value_of_another_type_is_named(kind: Any, value: Any, what: str) -> None:
    check = as_declared(kind, "size")

    assert check
    with pytest.raises(WrongTypeError) as caught:
        check(value)
    assert str(caught.value) == f"size gave {what}."


@pytest.mark.parametrize("kind", [Any, object, T, Named, Any | None])
def test_where_anything_fits_nothing_is_looked_at(kind: Any) -> None:
    assert as_declared(kind, "size") is None


# In a workflow.

ODD = """
    from collections.abc import Iterator
    import numpy, torch
    from torchserve_dag import Label, Labels

    def odd(text: Text) -> {kind}:
        return {value}

    def chunks(text: Text) -> Iterator[{kind}]:
        yield {value}

    def after(value: {kind}) -> Text:
        raise AssertionError("a wrong value was passed on")
"""


def answer(write: Write, kind: str, value: str, nodes: str = "answer: {function: odd}") -> Any:
    with Workflow.load(write(nodes, ODD.format(kind=kind, value=value))) as workflow:
        return workflow([Text("a")])[0]


@pytest.mark.parametrize(
    "nodes",
    [
        "answer: {function: odd}",
        "first: {function: odd}\nanswer: {function: after, input: first}",
        "answer: {function: chunks}",
        "many: {handler: words}\nanswer: {function: odd, each: many.words, input: request}",
    ],
    ids=["alone", "before another", "in chunks", "for each"],
)
def test_a_wrong_result_fails_its_request_and_goes_nowhere(
    write: Write, caplog: pytest.LogCaptureFixture, nodes: str
) -> None:
    node = "first" if "first" in nodes else "answer"
    failure = answer(write, "str", "len(text.text)", nodes)

    sentence = f"{node} gave int, where str is declared."
    assert failure == Failure(500, sentence, "WrongType", node)
    assert any(sentence in message for message in caplog.messages)
    assert "Traceback" not in caplog.text


def test_a_wrong_result_is_not_tried_again_and_has_its_fallback(write: Write) -> None:
    nodes = "answer: {{function: odd, retry: 3, on_error: {}}}"

    assert answer(write, "str", "1", nodes.format("{default: none}")) == "none"


@pytest.mark.parametrize(
    ("kind", "value", "given"),
    [("float", "numpy.float32(0.5)", 0.5), ("bool", "torch.tensor(1) == 1", True), ("list[int]", "(1, 2)", [1, 2])],
)
def test_a_result_is_converted_once(write: Write, kind: str, value: str, given: Any) -> None:
    result = answer(write, kind, value)

    assert (result, type(result)) == (given, type(given))


def handler_of(gives: str, output: str) -> str:
    return (
        IMPORTS
        + f"""
import numpy
from torchserve_dag import Label

class Upper(Handler[Text, str, str, {gives}]):
    def load(self, folder, settings, placement): pass
    def example(self) -> Text: return Text("good")
    def preprocess(self, item: Text) -> str: return item.text
    def infer(self, batch): return batch
    def postprocess(self, output: str, item: Text) -> {gives}: return {output}
"""
    )


def test_a_handlers_wrong_answer_fails_its_request(project: Path, write: Write) -> None:
    (project / "handlers" / "upper.py").write_text(handler_of("Text", 'Text(output) if output == "good" else output'))

    with Workflow.load(write("answer: {handler: upper}")) as workflow:
        good, bad = workflow([Text("good"), Text("bad")])

    assert good == Text("good")
    assert bad == Failure(500, "upper gave str, where Text is declared.", "WrongType", "answer")


def test_a_handler_whose_example_has_another_type_does_not_load(project: Path) -> None:
    (project / "handlers" / "upper.py").write_text(handler_of("Text", "output"))

    with pytest.raises(
        RuntimeError, match=r"upper failed on its own example: upper gave str, where Text is declared\."
    ):
        Workflow.load(project / "handlers" / "upper.yaml")


# In what a client gets.


@dataclass
class Whatever:
    value: Any


class Other:
    pass


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (Label("a", np.float32(0.5)), {"name": "a", "score": 0.5}),
        (Label(np.str_("a"), torch.tensor(0.5)), {"name": "a", "score": 0.5}),
        ([np.int64(1), np.bool_(True), torch.tensor(False), np.array(2)], [1, True, False, 2]),  # noqa: FBT003
        (Whatever({"a": (np.float16(0.5), None)}), {"value": {"a": [0.5, None]}}),
        (np.float32(0.5), 0.5),
        (Colour.RED, "red"),
    ],
)
def test_scalars_of_numpy_and_torch_are_written(value: Any, data: Any) -> None:
    assert json.loads(plain.to_json(value)) == data


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (Label("a", torch.zeros(3)), "score is torch.Tensor of shape (3,)"),  # type: ignore[arg-type]
        (Label("a", float("nan")), "score is nan, which JSON does not have"),
        (Label("a", np.float32("inf")), "score is inf, which JSON does not have"),  # type: ignore[arg-type]
        (Labels([Label("a", 1.0), Label("b\ud800", 1.0)]), "labels[1].name is text with half a surrogate pair"),
        (DetectedObject("a", 1.0, Box(0, 0, np.zeros(2), 1)), "box.right is numpy.ndarray of shape (2,)"),  # type: ignore[arg-type]
        (Whatever({"a": [Other()]}), "value.a[0] is tests.Other"),
        (Whatever(Label), "value is the type Label"),
        (Whatever(b"bytes"), "value is bytes"),
        (complex(1, 2), "it is complex"),
    ],
)
def test_what_cannot_be_written_is_named(value: Any, what: str) -> None:
    with pytest.raises(plain.UnwritableError) as caught:
        plain.to_json(value)
    assert str(caught.value) == what


def test_what_contains_itself_is_named() -> None:
    circle: list[Any] = []
    circle.append(circle)

    with pytest.raises(plain.UnwritableError, match=r"\[0\]\[0\]\[0\] is nested too deeply, or contains itself"):
        plain.to_json(circle)


def test_a_score_of_numpy_is_a_score() -> None:
    assert score_in(Label("a", np.float32(0.5)), "score") == 0.5
    assert score_in(Label("a", torch.tensor(0.5)), "score") == 0.5  # type: ignore[arg-type]


Load = Callable[..., Any]
VALUES = "Label('a', numpy.zeros(3)) if text.text == 'bad' else Label('a', numpy.float32(0.5))"


@pytest.fixture
def load(project: Path, tmp_path: Path) -> Iterator[Load]:
    """Builds a workflow, and loads its archive, or that of a segment."""
    made = []

    def load_archive(segment: str = "") -> Any:
        assert build(Project(project), ["flow"]).problems == []
        folder, kind = ("workflow_store", segments) if segment else ("model_store", service)
        archive = project / folder / f"flow-1.0{segment and f'-{segment}'}.mar"
        made.append(kind.load(unpacked(archive, tmp_path / "archive"), None))
        return made[-1]

    yield load_archive
    for one in made:
        one.close()


def ask(loaded: Any, text: str, **options: str) -> tuple[int, Mapping[str, Any]]:
    response = loaded.submit(ServiceRequest("7", text.encode(), options=options)).result(60)
    return response.status, json.loads(response.body)


@pytest.mark.parametrize(
    ("nodes", "output", "options", "where", "node"),
    [
        ("label: {function: odd}", "label", {}, "label.score", "label"),
        ("label: {function: odd}", "{best: label, name: label.name}", {}, "best.score", "label"),
        ("label: {function: odd}\nanswer: {function: name, input: label}", "answer", {OUTPUTS: "label"}, "label.score", "label"),
        ("label: {function: chunks}", "label", {}, "label[0].score", "label"),
    ],
    ids=["one answer", "several", "asked for", "in chunks"],
)  # fmt: skip
def test_the_client_and_the_log_read_what_cannot_be_written(
    write: Write, load: Load, caplog: pytest.LogCaptureFixture,
    nodes: str, output: str, options: dict[str, str], where: str, node: str,
) -> None:  # fmt: skip
    functions = ODD.format(kind="Label", value=VALUES) + "\n    def name(label: Label) -> str: return label.name\n"
    write(nodes, functions, output=output)
    loaded = load()

    status, failure = ask(loaded, "bad", **options)

    sentence = f"The answer cannot be written: {where} is numpy.ndarray of shape (3,)."
    assert (status, failure["message"], failure["node"]) == (500, sentence, node)
    assert f"request 7: {sentence}" in caplog.messages
    assert ask(loaded, "good", **options)[0] == 200


def test_a_chunk_that_cannot_be_written_ends_the_stream_with_its_name(write: Write, load: Load) -> None:
    value = "Label('a', 0.5)\n        yield Label('a', numpy.zeros(3))"
    write("label: {function: chunks}", ODD.format(kind="Label", value=value), output="label")
    sent: list[bytes] = []

    response = load().submit(ServiceRequest("7", b"a"), lambda body, *_: sent.append(body)).result(60)

    assert [json.loads(body) for body in sent] == [{"name": "a", "score": 0.5}]
    assert "A chunk cannot be written: label.score is numpy.ndarray of shape (3,)." in response.body.decode()


def test_a_segment_writes_scalars_and_names_what_it_cannot_write(write: Write, load: Load, project: Path) -> None:
    put(
        project,
        {
            "handlers/score.yaml": f'name: score\nversion: "1.0"\n{CARD}',
            "handlers/score.py": handler_of(
                "Label", 'Label("a", numpy.float32(0.5) if output == "good" else numpy.zeros(2))'
            )
            + "\nimport numpy\nfrom torchserve_dag import Label\n",
        },
    )
    write(
        "first: {handler: score}\nbetween: {function: name, input: first}\nanswer: {handler: upper, input: between}",
        "from torchserve_dag import Label\ndef name(label: Label) -> Text: return Text(label.name)",
    )
    loaded = load("first")

    good, bad = (unpack(loaded.submit(ServiceRequest("7", body)).result(60).body) for body in (b"good", b"bad"))

    assert json.loads(good["first"]) == {"name": "a", "score": 0.5}
    failure = json.loads(bad[FAILURE_PART])
    sentence = "The answer cannot be written: first.score is numpy.ndarray of shape (2,)."
    assert (failure["code"], failure["message"], failure["node"]) == (500, sentence, "first")
