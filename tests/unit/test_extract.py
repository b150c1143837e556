"""Structured output: an answer fits its schema, or is a failure that says why."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.random_schemas import SchemaMaker, answer_instead, fits
from tests.scripted_model import ROOT, copy_workflows, script, scripted_project
from tests.tiny_llama import make_gguf, make_llama
from torchserve_dag import (
    Chat,
    Failure,
    InputError,
    JsonSchema,
    ResponseFormat,
    TextChunk,
    Tool,
    UnfitAnswerError,
    Usage,
    Workflow,
    check_schema,
    in_grammars,
    read_json_answer,
)
from torchserve_dag.archives.signature import signature
from torchserve_dag.pictures.mermaid import mermaid
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.messages import FunctionTool
from torchserve_dag.runtime.project.folders import Project

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0}, "y": {"type": "integer"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
GOOD = '{"x": 1, "y": 2}'
BAD = '{"x": -1, "y": 2}'
LLAMA = """
name: text_generation
version: "1.0"
settings: {engine: openvino, model: gguf/llama.gguf, exact: true, context: 2048, max_tokens: 80}
card: {does: It writes., input: A chat., output: A text., limits: A test., weights: []}
"""


def wanted(schema: dict[str, Any]) -> ResponseFormat:
    return ResponseFormat("json_schema", JsonSchema("it", schema))


def say(*answers: Any, schema: dict[str, Any] | None = POINT, **more: Any) -> Chat:
    said = [answer if isinstance(answer, dict) else {"text": answer} for answer in answers]
    return script(said, **{"response_format": None if schema is None else wanted(schema), **more})


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workflow]:
    folder = scripted_project(tmp_path_factory.mktemp("project"), "extract", "extract_round")
    with Workflow.load(folder / "workflows" / "extract.yaml") as workflow:
        yield workflow


class TestAnswers:
    def test_what_fits_is_the_answer_as_the_model_wrote_it(self, workflow: Workflow) -> None:
        (answer,) = workflow([say(f"\n{GOOD} ")])

        assert answer == TextChunk(GOOD, finish_reason="stop", usage=Usage.of(100, 10), served_by="scripted")

    def test_what_does_not_fit_is_written_again_and_both_rounds_are_paid(self, workflow: Workflow) -> None:
        (answer,) = workflow([say(BAD, GOOD)])

        assert (answer.text, answer.usage) == (GOOD, Usage.of(200, 20))

    @pytest.mark.parametrize(
        ("said", "sentence"),
        [
            (BAD, "The answer does not fit the schema: x: it is less than 0."),
            ('{"x": 1}', 'does not fit the schema: as a whole: "y" is missing.'),
            ('{"x": 1, "y": 1, "z": 1}', 'there is no key "z" in the schema.'),
            ('{"x": 1, "y": 1, "x": 1}', 'The answer is not JSON: "x" is written twice in one object.'),
            (f"Here: {GOOD}", "The answer is not JSON: "),
            ('{"x": true, "y": 1}', "x: it is of the type boolean, not integer."),
        ],
    )
    def test_what_does_not_fit_twice_is_a_failure_with_place_and_reason(
        self, workflow: Workflow, said: str, sentence: str
    ) -> None:
        (failure,) = workflow([say(said)])

        assert isinstance(failure, Failure)
        assert (failure.status, failure.type, failure.node) == (422, "UnfitAnswer", "document")
        assert sentence in failure.message
        assert failure.message.endswith(" That was try 2.")

    @pytest.mark.parametrize("reason", ["length", "content_filter"])
    def test_an_answer_that_was_cut_off_is_a_failure_even_if_it_fits(self, workflow: Workflow, reason: str) -> None:
        """Its end might have been another; and a second round would be cut off too."""
        (failure,) = workflow([say({"text": GOOD, "reason": reason}, GOOD)])

        assert isinstance(failure, Failure)
        assert failure.status == 422
        assert f"cut off ({reason})" in failure.message

    def test_without_a_response_format_the_workflow_has_a_schema_of_its_own(self, workflow: Workflow) -> None:
        fine = '{"who": "Anna", "what": "sings", "day": null}'
        found = workflow([say(fine, schema=None), say(GOOD, schema=None)])
        anything = workflow(
            [
                say(GOOD, response_format=ResponseFormat("json_object")),
                say("[1]", response_format=ResponseFormat("json_object")),
            ]
        )

        assert [getattr(one, "text", None) for one in found] == [fine, None]
        assert [getattr(one, "text", None) for one in anything] == [GOOD, None]

    def test_it_is_a_chat_model_of_openais_api(self, workflow: Workflow) -> None:
        assert signature(workflow.graph)["language"] == ["chat"]

    @pytest.mark.parametrize(
        ("more", "sentence"),
        [
            ({"n": 2}, "n: an extraction gives one JSON document; leave it out."),
            ({"tools": [Tool(FunctionTool("f"))]}, "tools: "),
            ({"logprobs": True}, "logprobs: "),
        ],
    )
    def test_what_an_extraction_cannot_do_is_refused(
        self, workflow: Workflow, more: dict[str, Any], sentence: str
    ) -> None:
        (failure,) = workflow([say(GOOD, **more)])

        assert failure.status == 400
        assert failure.message.startswith(sentence)


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ({"type": "objecty"}, "schema.type: there is no type 'objecty'"),
        ({"type": "string", "pattern": "(a+)+$"}, "schema.pattern: an answer cannot be held to that"),
        ({"type": "string", "format": "hostname"}, "schema.format: an answer can be held to date"),
        ({"$ref": "#"}, "schema: a $ref leads back to itself before any value."),
        (
            {"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}},
            "leads back to itself",
        ),
        ({"$ref": "https://example.com/schema"}, "schema.$ref: there is no 'https://example.com/schema'"),
        ({"const": {"$ref": "https://example.com"}, "$ref": "#/const"}, "schema.$ref: there is no '#/const'"),
        ({"properties": {"a": False}}, "schema.properties.a: no value fits false"),
        ({"oneOf": []}, "oneOf: write a list of schemas"),
        ({"minimum": "1"}, "schema.minimum: write a number"),
        ({"minProperties": -1}, "schema.minProperties: write a whole number"),
        ({"uniqueItems": 1}, "schema.uniqueItems: write true or false"),
        ({"not": {}}, "schema.not: an answer cannot be held to that"),
    ],
)
def test_a_schema_that_is_not_understood_is_refused_by_its_place(
    workflow: Workflow, schema: dict[str, Any], sentence: str
) -> None:
    (failure,) = workflow([say(GOOD, schema=schema)])

    assert isinstance(failure, Failure)
    assert failure.status == 400
    assert sentence in failure.message


def test_an_answer_that_cannot_be_compared_in_bounded_steps_is_a_failure(workflow: Workflow) -> None:
    """A schema of 60 parts whose references branch 2³⁰ times; and one whose references go deeper than Python's stack."""
    branching = {f"d{at}": {"anyOf": [{"$ref": f"#/$defs/d{at + 1}"}] * 2} for at in range(30)}
    deep = {f"d{at}": {"$ref": f"#/$defs/d{at + 1}"} for at in range(1000)}
    schemas = [
        {"$ref": "#/$defs/d0", "$defs": branching | {"d30": {"type": "null"}}},
        {"$ref": "#/$defs/d0", "$defs": deep | {"d1000": {"type": "null"}}},
    ]
    failures = workflow([say("1", schema=schema) for schema in schemas])

    assert [(failure.status, "make the schema simpler" in failure.message) for failure in failures] == [(422, True)] * 2


@pytest.mark.parametrize(
    ("schema", "fitting", "others"),
    [
        ({"format": "date-time"}, ["2026-11-27T10:00:00Z", "2026-11-27t10:00:00.123+01:00"], ["2026-11-27T10:00:00", "2026-13-27T10:00:00Z", "2026-11-27"]),
        ({"format": "date"}, ["2024-02-29", 5], ["2023-02-29", "20240229", "2024-02-29\n"]),
        ({"format": "uuid"}, ["12345678-9ABC-4def-8123-456789abcdef"], ["123456789abc4def8123456789abcdef"]),
        ({"enum": [1, "a", {"b": [True]}]}, [1.0, "a", {"b": [True]}], [True, "1", {"b": [1]}]),
        ({"uniqueItems": True}, [[1, True, "1"], [[1], [1, 1]]], [[1, 1.0], [{"a": 1, "b": 2}, {"b": 2, "a": 1}]]),
        ({"oneOf": [{"type": "integer"}, {"minimum": 5}]}, [1, 5.5], [5, 0.5]),
        ({"type": "integer"}, [1.0, -0.0, 10**40], [1.5, True, "1"]),
        ({"maxLength": 1}, ["😀"], ["ab"]),
    ],
)  # fmt: skip
def test_values_are_compared_as_json_schema_has_it(
    schema: dict[str, Any], fitting: list[Any], others: list[Any]
) -> None:
    check_schema(schema, validated=True)

    for value in fitting:
        assert read_json_answer(json.dumps(value), schema) == value
    for value in others:
        with pytest.raises(UnfitAnswerError):
            read_json_answer(json.dumps(value), schema)


def test_of_several_forms_the_one_that_was_meant_is_told() -> None:
    schema = {
        "anyOf": [
            {"type": "null"},
            {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}},
        ]
    }

    with pytest.raises(UnfitAnswerError, match=r"schema: a\[1\]: it is of the type string, not integer"):
        read_json_answer('{"a": [1, "x"]}', schema)


def test_an_engine_is_asked_to_hold_to_what_a_grammar_can(workflow: Workflow) -> None:
    schema = {
        "type": "object",
        "properties": {"minimum": {"type": "integer", "minimum": 3}, "on": {"format": "date"}},
        "anyOf": [{"minProperties": 1}],
        "additionalProperties": {"uniqueItems": True},
    }
    with pytest.raises(InputError):
        check_schema(schema)
    kept = in_grammars(schema)

    check_schema(kept)
    assert kept == {
        "type": "object",
        "properties": {"minimum": {"type": "integer"}, "on": {}},
        "anyOf": [{}],
        "additionalProperties": {},
    }


def test_a_thousand_random_schemas_and_hostile_answers_give_no_document_that_does_not_fit(workflow: Workflow) -> None:
    """Judged by `jsonschema`; and what it accepts is not refused either."""
    chance = random.Random(17)
    cases = []
    for _ in range(1000):
        schema, document = SchemaMaker(chance).make()
        said = [{"text": answer_instead(chance, document)} for _ in range(2)]
        said[0] |= {"reason": "length"} if chance.random() < 0.1 else {}
        cases.append((schema, said))
    answers = workflow([say(*said, schema=schema) for schema, said in cases])
    served = 0
    for (schema, said), answer in zip(cases, answers, strict=True):
        rounds = said[:1] if "reason" in said[0] else said
        fitting = [one["text"] for one in rounds if "reason" not in one and fits(one["text"], schema)]
        if fitting:
            served += 1
            assert isinstance(answer, TextChunk), (answer, schema, said)
            assert answer.text == fitting[0].strip()
        else:
            assert isinstance(answer, Failure), (answer, schema, said)
            assert (answer.status, answer.type) == (422, "UnfitAnswer")

    assert 200 < served < 800


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workflow]:
    folder = tmp_path_factory.mktemp("real")
    for name in ("handlers", "workflows", "weights"):
        (folder / name).mkdir()
    shutil.copy(ROOT / "handlers" / "text_generation.py", folder / "handlers")
    (folder / "handlers" / "text_generation.yaml").write_text(LLAMA)
    copy_workflows(folder, "extract", "extract_round")
    make_gguf(folder / "weights" / "gguf", make_llama(folder / "llama"), half=True)
    with Workflow.load(folder / "workflows" / "extract.yaml") as workflow:
        yield workflow


def test_a_real_engine_gives_documents_that_fit_or_failures(real: Workflow) -> None:
    """A model with random weights, drawn from at a high temperature: its grammar alone leaves parts of schemas out."""
    chance = random.Random(3)
    schemas: list[dict[str, Any]] = [
        {"type": "integer", "enum": ["a"]},  # which OpenVINO's grammar takes for "a"
        {"enum": ["small", "large"]},
        {"const": {"a": [1, None]}},
        {"type": "boolean"},
        *(SchemaMaker(chance).make()[0] for _ in range(36)),
    ]
    chats = [Chat.of("Fill it in.", response_format=wanted(schema), temperature=1.2) for schema in schemas]
    answers = real(chats)
    fitting = [
        fits(answer.text, schema)
        for schema, answer in zip(schemas, answers, strict=True)
        if isinstance(answer, TextChunk)
    ]

    assert all(fitting)
    assert len(fitting) >= 3
    assert {answer.status for answer in answers if isinstance(answer, Failure)} == {422}
    assert isinstance(answers[0], Failure)
    assert all(isinstance(answer, TextChunk) for answer in answers[1:4])


def test_the_page_shows_the_workflow() -> None:
    picture = mermaid(read_graph(Project(ROOT), ROOT / "workflows" / "extract.yaml"))

    assert f"```mermaid\n{picture}```" in (ROOT / "docs" / "structured-output.md").read_text("utf-8")
