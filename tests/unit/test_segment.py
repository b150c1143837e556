"""A workflow falls into segments, one a model, which together answer as the whole does."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.conftest import Write
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.graph.torchserve.segment import (
    REQUEST_PART,
    Segment,
    pack,
    parents,
    segments,
    unpack,
    unseal,
)
from torchserve_dag.runtime.messages import Failure, Text
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.workflow import Workflow

CHAIN = """
    one: {handler: upper}
    two: {handler: upper, input: one}
    answer: {function: twice, input: two}
"""
DIAMOND = """
    start: {handler: upper}
    left: {function: twice, input: start}
    one: {handler: upper, input: left}
    two: {handler: words, input: start}
    joined: {function: join, inputs: {text: one, words: two}}
    answer: {handler: upper, input: joined}
"""
EACH = """
    split: {handler: words}
    word: {function: word_text, each: split.words, when: item.size > 1}
    upper: {handler: upper, each: word, batch: 4}
    answer: {function: join_words, inputs: {request: request, words: upper, by: parameters.by}}
"""
FUNCTIONS = """
    def twice(text: Text) -> Text: return Text(text.text * 2)
    def join(text: Text, words: object) -> Text: return Text(f"{text.text}/{len(words.words)}")
    def word_text(word: object) -> Text: return Text(word.text)
    def join_words(request: Text, words: list[Text | Skipped], by: str | None) -> Text:
        return Text("-".join("?" if isinstance(w, Skipped) else w.text for w in words) + f" ({by}, of {len(request.text)})")
    def pass_on(text: Text) -> Text: return text
"""


def graph_of(path: Path) -> Graph:
    return read_graph(Project(path.parent.parent), path)


def test_a_chain_falls_into_a_segment_for_each_model(write: Write) -> None:
    found = segments(graph_of(write(CHAIN, FUNCTIONS)))

    assert list(found) == ["one", "two"]
    assert [(s.known, s.last) for s in found.values()] == [(frozenset(), False), ({"one"}, True)]
    assert [list(s.part().nodes) for s in found.values()] == [["one"], ["two", "answer"]]
    assert [parents(found, name) for name in found] == [[], ["one"]]


def test_a_diamond_falls_into_segments_whose_envelopes_meet(write: Write) -> None:
    found = segments(graph_of(write(DIAMOND, FUNCTIONS)))

    assert {name: sorted(parents(found, name)) for name in found} == {
        "start": [],
        "one": ["start"],
        "two": ["start"],
        "answer": ["one", "two"],
    }
    assert [name for name, segment in found.items() if segment.last] == ["answer"]
    assert set(found["one"].part().nodes) == {"left", "one"}


def test_a_workflow_with_each_falls_into_segments(write: Write) -> None:
    found = segments(graph_of(write(EACH, FUNCTIONS)))

    assert {name: parents(found, name) for name in found} == {"split": [], "upper": ["split"]}
    assert set(found["upper"].part().nodes) == {"word", "upper", "answer"}


def through(project: Project, graph: Graph, body: bytes, parameters: dict[str, str]) -> Any:
    """The workflow's answer by its segments, one after the other, with bytes between them."""
    found = segments(graph)
    sealed: dict[str, bytes] = {}
    for name, segment in found.items():
        row = {parent: sealed[parent] for parent in parents(found, name)}
        parts = unseal(row) if row else {REQUEST_PART: body}
        with Workflow(project, segment.part()) as workflow:
            result = workflow.engine.submit(
                parts[REQUEST_PART], parameters, known=segment.known_results(parts)
            ).future.result()
        if segment.last or isinstance(result, Failure):
            return result
        sealed[name] = segment.seal(parts, result)
    raise AssertionError("no segment is the last")


@pytest.mark.parametrize("nodes", [CHAIN, DIAMOND, EACH])
@pytest.mark.parametrize("body", [b"some a words", b"", b"bad", b" "])
def test_the_segments_together_answer_as_the_whole(write: Write, nodes: str, body: bytes) -> None:
    path = write(nodes, FUNCTIONS)
    project, graph = Project(path.parent.parent), graph_of(path)
    with Workflow(project, graph) as whole:
        (expected,) = whole([body], {"by": "me"})

    assert through(project, graph, body, {"by": "me"}) == expected


HANDLER = """
    from __future__ import annotations
    from dataclasses import dataclass
    from typing import Any
    from torchserve_dag import Handler, Photo, Text

    @dataclass(frozen=True)
    class Found:
        parts: list[Photo]

    class Odd(Handler[Text, str, str, {kind}]):
        def load(self, folder, settings, placement): pass
        def example(self) -> Text: return Text("")
        def preprocess(self, item: Text) -> str: return item.text
        def infer(self, batch): return batch
        def postprocess(self, output: str, item: Text) -> {kind}: raise NotImplementedError
"""


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (
            "answer: {function: pass_on}",
            "it has no model, and TorchServe 0.12.0 can lose the answer of a function node",
        ),
        (
            "one: {handler: upper}\ntwo: {handler: words}\nanswer: {function: join, inputs: {text: one, words: two}}",
            "it starts with several models (one, two), and TorchServe's engine wants one",
        ),
        (
            (
                "zero: {handler: upper}\none: {handler: upper, input: zero}\ntwo: {handler: words, input: zero}\n"
                "answer: {function: join, inputs: {text: one, words: two}}"
            ),
            (
                "it ends with several models (one, two); the node that joins them would be a function, whose answer "
                "TorchServe 0.12.0 can lose"
            ),
        ),
    ],
)
def test_what_torchserves_engine_cannot_run_is_refused(write: Write, nodes: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        segments(graph_of(write(nodes, FUNCTIONS)))


@pytest.mark.parametrize(
    "kind", ["Photo", "list[Photo]", "Found", "dict[str, Found]", "bytes", "dict[int, str]", "Found | None"]
)
def test_a_model_whose_answer_json_does_not_bring_back_is_refused(write: Write, project: Path, kind: str) -> None:
    (project / "handlers" / "upper.py").write_text(textwrap.dedent(HANDLER).replace("{kind}", kind))

    with pytest.raises(ValueError, match=r"answer gives .*, which does not fit an envelope"):
        segments(graph_of(write("answer: {handler: upper}")))


@given(st.dictionaries(st.text(max_size=8), st.binary(max_size=40), max_size=5))
def test_what_is_packed_is_unpacked(parts: dict[str, bytes]) -> None:
    assert unpack(pack(parts)) == parts


def test_a_failure_travels_in_the_envelope(write: Write) -> None:
    found = segments(graph_of(write(CHAIN, FUNCTIONS)))
    failure = Failure(422, "That text is bad.", "InputError", "one")

    sealed = found["one"].seal({REQUEST_PART: b"bad"}, failure)

    assert set(unseal({"body": sealed})) == {"!failure"}


def test_the_last_segment_gives_the_answer_as_the_client_gets_it(write: Write) -> None:
    last: Segment = segments(graph_of(write(CHAIN, FUNCTIONS)))["two"]

    assert last.seal({}, Text("a")) == b'{"text": "a"}'
    assert last.seal({}, Failure(400, "No.")) == b'{"code": 400, "type": "InputError", "message": "No."}'


def test_envelopes_of_several_parents_are_read_together() -> None:
    row = {"one": bytearray(pack({"request": b"r", "one": b"1"})), "two": pack({"request": b"r", "two": b"2"})}

    assert unseal(row) == {"request": b"r", "one": b"1", "two": b"2"}
