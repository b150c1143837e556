"""Nodes that take chunks as they come, hold them back, end other nodes early, or run in rounds."""

from __future__ import annotations

import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from torchserve_dag import FailedError, Failure, Skipped, Text, Workflow
from torchserve_dag.runtime.data.source import CheckError

FUNCTIONS = '''
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from torchserve_dag import InputError, Skipped, Text

go, closed = threading.Event(), []


@dataclass(frozen=True)
class Count:
    text: str
    rounds: int = 0

    @property
    def odd(self) -> bool:
        raise ValueError("odd is broken")


def words(text: Text) -> Iterator[Text]:
    """The words of a text; at "wait" it waits for `go`, and at "raise" it raises."""
    try:
        for word in text.text.split():
            if word == "raise":
                raise InputError("That word.", 422)
            yield Text(word)
            if word == "wait":
                go.wait(20)
    finally:
        closed.append(text.text)


async def sentences(words: AsyncIterator[Text]) -> AsyncIterator[Text]:
    """Holds words back until one ends with a point."""
    held = []
    try:
        async for word in words:
            held.append(word.text)
            if word.text.endswith("."):
                yield Text(" ".join(held))
                held = []
        if held:
            yield Text(" ".join(held) + "…")
    finally:
        closed.append("sentences")


async def pairs(left: AsyncIterator[Text], right: AsyncIterator[Text], last: Text) -> AsyncIterator[Text]:
    async for one in left:
        other = await anext(right, Text("-"))
        yield Text(f"{one.text}/{other.text}/{last.text}")


async def sleeps(words: AsyncIterator[Text]) -> AsyncIterator[Text]:
    import asyncio
    yield Text("first")
    await asyncio.sleep(0.01)
    yield Text("never")


async def ints(words: AsyncIterator[Text]) -> AsyncIterator[Text]:
    async for word in words:
        yield len(word.text)


def loud(text: Text) -> Text:
    return Text(text.text.upper())


def bad(text: Text) -> bool:
    return "bad" in text.text


def slow(text: Text) -> Text:
    go.wait(20)
    return text


def last(words: list[Text]) -> Text:
    return words[-1] if words else Text("nothing")


def seen(text: Text | Skipped) -> Text:
    return Text("skipped") if isinstance(text, Skipped) else text


def count(text: Text) -> Count:
    return Count(text.text)


def grow(before: Count) -> Count:
    if before.text == "fail" and before.rounds == 2:
        raise InputError("Two is enough.", 422)
    return Count(before.text, before.rounds + 1)


def told(text: Text) -> list[str]:
    return text.text.split()


def give(count: Count) -> Text:
    return Text(f"{count.text} {count.rounds}")
'''


def workflow(folder: Path, nodes: str, output: str, name: str = "flow") -> Path:
    (folder / "workflows").mkdir(exist_ok=True)
    (folder / "workflows" / "flow.py").write_text(FUNCTIONS)
    path = folder / "workflows" / f"{name}.yaml"
    head = f'name: {name}\nversion: "1.0"\ncode: flow.py\ndoes: It tests.\nnodes:\n'
    path.write_text(f"{head}{textwrap.indent(textwrap.dedent(nodes).strip(), '  ')}\noutput: {output}\n")
    return path


def functions(loaded: Workflow) -> dict[str, Any]:
    node = next(iter(loaded.graph.nodes.values()))
    found: dict[str, Any] = node.code.kind.function.__globals__  # type: ignore[attr-defined]
    return found


def problem(folder: Path, nodes: str, output: str) -> str:
    with pytest.raises(CheckError) as raised:
        Workflow.load(workflow(folder, nodes, output)).close()
    return str(raised.value)


def texts(answer: Any) -> Any:
    return [one.text if isinstance(one, Text) else one for one in answer]


SENTENCES = "words: {function: words}\nsentences: {function: sentences, input: words}"


class TestFeeds:
    """Functions that take chunks as they come: `async for`."""

    def test_chunks_are_held_back_and_released(self, tmp_path: Path) -> None:
        with Workflow.load(workflow(tmp_path, SENTENCES, "sentences")) as flow:
            assert texts(flow([b"One two. Three. Four"])[0]) == ["One two.", "Three.", "Four…"]
            assert texts(flow([b" "])[0]) == []
            assert [one.text for one in flow.stream(Text("a b. c"))] == ["a b.", "c…"]

    def test_it_runs_while_its_source_goes_on(self, tmp_path: Path) -> None:
        with Workflow.load(workflow(tmp_path, SENTENCES, "sentences")) as flow:
            stream = flow.stream(Text("One. wait two."))
            assert next(stream).text == "One."  # and `words` waits
            functions(flow)["go"].set()
            assert [one.text for one in stream] == ["wait two."]

    def test_nodes_follow_what_it_gives(self, tmp_path: Path) -> None:
        nodes = SENTENCES + "\nloud: {function: loud, each: sentences}\nlast: {function: last, input: loud}"
        with Workflow.load(workflow(tmp_path, nodes, "{all: loud, last: last}")) as flow:
            answer = flow([b"a. b c."])[0]
        assert (texts(answer["all"]), answer["last"].text) == (["A.", "B C."], "B C.")

    def test_it_takes_several_streams_and_whole_values(self, tmp_path: Path) -> None:
        nodes = """
            words: {function: words}
            loud: {function: loud, each: words}
            end: {function: last, input: words}
            pairs: {function: pairs, inputs: {left: words, right: loud, last: end}}
        """
        with Workflow.load(workflow(tmp_path, nodes, "pairs")) as flow:
            assert texts(flow([b"a b"])[0]) == ["a/A/b", "b/B/b"]

    def test_a_source_that_is_skipped_is_empty(self, tmp_path: Path) -> None:
        nodes = 'words: {function: words, when: request.text != "no"}\nsentences: {function: sentences, input: words}'
        with Workflow.load(workflow(tmp_path, nodes, "sentences")) as flow:
            assert [texts(answer) for answer in flow([b"no", b"yes."])] == [[], ["yes."]]

    def test_a_failure_of_its_source_is_the_requests(self, tmp_path: Path) -> None:
        with Workflow.load(workflow(tmp_path, SENTENCES, "sentences")) as flow:
            failed, fine = flow([b"One. raise", b"One."])
            assert isinstance(failed, Failure)
            assert (failed.status, failed.node, texts(fine)) == (422, "words", ["One."])
            with pytest.raises(FailedError):
                list(flow.stream(Text("One. raise")))

    def test_who_leaves_closes_it(self, tmp_path: Path) -> None:
        with Workflow.load(workflow(tmp_path, SENTENCES, "sentences")) as flow:
            stream = flow.stream(Text("One. wait two."))
            next(stream)
            stream.close()
            functions(flow)["go"].set()
            assert texts(flow([b"a."])[0]) == ["a."]
            closed, deadline = functions(flow)["closed"], time.monotonic() + 20
            while len(closed) < 4 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert sorted(closed) == ["One. wait two.", "a.", "sentences", "sentences"]

    def test_many_at_once_are_not_mixed(self, tmp_path: Path) -> None:
        with Workflow.load(workflow(tmp_path, SENTENCES, "sentences")) as flow:
            bodies = [f"{i}a {i}b. {i}c".encode() for i in range(100)]
            answers = [texts(answer) for answer in flow(bodies)]
        assert answers == [[f"{i}a {i}b.", f"{i}c…"] for i in range(100)]

    @pytest.mark.parametrize(
        ("function", "message"),
        [("sleeps", "InternalError"), ("ints", "WrongType")],
    )
    def test_what_it_must_not_do_fails_its_request(self, tmp_path: Path, function: str, message: str) -> None:
        nodes = f"words: {{function: words}}\nnext: {{function: {function}, input: words}}"
        with Workflow.load(workflow(tmp_path, nodes, "next")) as flow:
            failed = flow([b"a b"])[0]
        assert isinstance(failed, Failure)
        assert (failed.status, failed.type, failed.node) == (500, message, "next")

    @pytest.mark.parametrize(
        ("nodes", "message"),
        [
            ("told: {function: told}\nsentences: {function: sentences, input: told}", "takes list[Text]"),
            (
                "list: {function: words_of}\nall: {function: loud, each: list}\nsentences: {function: sentences, input: all}",
                "takes chunks as they come, and all gives none",
            ),
            ("words: {function: words}\nsentences: {function: sentences, input: request}", '"request" is no node'),
        ],
    )
    def test_it_needs_a_node_that_gives_chunks(self, tmp_path: Path, nodes: str, message: str) -> None:
        more = "\n\ndef words_of(text: Text) -> list[Text]:\n    return [text]\n"
        path = workflow(tmp_path, nodes, "sentences")
        (tmp_path / "workflows" / "flow.py").write_text(FUNCTIONS + more)
        with pytest.raises(CheckError) as raised:
            Workflow.load(path).close()
        assert message in str(raised.value)


STOPS = """
    words: {function: words}
    bad: {function: bad, each: words, stops: {words: bad}}
    released: {function: pairs, inputs: {left: words, right: words, last: verdict}}
    verdict: {function: loud, input: request}
"""


class TestStops:
    """A node that ends another early."""

    def test_a_stream_ends_with_what_it_has(self, tmp_path: Path) -> None:
        nodes = "words: {function: words}\nbad: {function: bad, each: words, stops: {words: bad}}"
        with Workflow.load(workflow(tmp_path, nodes, "words")) as flow:
            stopped, fine = flow([b"a b bad wait c d", b"a b c"])
            assert texts(fine) == ["a", "b", "c"]
            assert texts(stopped)[:3] == ["a", "b", "bad"]
            assert "d" not in texts(stopped)
            assert [one.text for one in flow.stream(Text("a bad wait c d"))][:2] == ["a", "bad"]
            functions(flow)["go"].set()

    def test_one_that_runs_elsewhere_is_cancelled(self, tmp_path: Path) -> None:
        workflow(tmp_path, "slow: {function: slow}", "slow", "inner")
        nodes = """
            inner: {workflow: inner}
            bad: {function: bad, input: request, stops: {inner: bad}}
            seen: {function: seen, input: inner}
        """
        with Workflow.load(workflow(tmp_path, nodes, "seen")) as flow:
            assert flow([b"bad"])[0].text == "skipped"
            functions_of = flow.graph.nodes["seen"].code.kind.function.__globals__  # type: ignore[attr-defined]
            functions_of["go"].set()
            assert flow([b"good"])[0].text == "good"

    def test_one_in_a_lane_is_not_waited_for(self, tmp_path: Path) -> None:
        nodes = "slow: {function: slow}\nbad: {function: bad, stops: {slow: bad}}\nseen: {function: seen, input: slow}"
        with Workflow.load(workflow(tmp_path, nodes, "seen")) as flow:
            timer = threading.Timer(15, functions(flow)["go"].set)
            timer.start()
            assert flow([b"bad"])[0].text == "skipped"
            assert not functions(flow)["go"].is_set()
            functions(flow)["go"].set()
            timer.cancel()

    def test_one_that_has_not_begun_never_does(self, tmp_path: Path) -> None:
        nodes = """
            slow: {function: slow}
            later: {function: words, input: slow}
            bad: {function: bad, input: request, stops: {later: bad}}
            end: {function: last, input: later}
        """
        with Workflow.load(workflow(tmp_path, nodes, "end")) as flow:
            threading.Timer(0.2, functions(flow)["go"].set).start()
            assert [answer.text for answer in flow([b"bad", b"good"])] == ["nothing", "good"]

    def test_each_answer_decides_and_what_is_missing_is_skipped(self, tmp_path: Path) -> None:
        nodes = """
            told: {function: told_texts}
            slow: {function: slow, each: told}
            bad: {function: bad, each: told, stops: {slow: bad}}
        """
        path = workflow(tmp_path, nodes, "slow")
        more = "\n\ndef told_texts(text: Text) -> list[Text]:\n    return [Text(word) for word in text.text.split()]\n"
        (tmp_path / "workflows" / "flow.py").write_text(FUNCTIONS + more)
        with Workflow.load(path) as flow:
            assert flow([b"a bad"])[0] == [Skipped("slow"), Skipped("slow")]
            functions(flow)["go"].set()
            assert texts(flow([b"a b"])[0]) == ["a", "b"]

    def test_a_default_decides_too(self, tmp_path: Path) -> None:
        """Where the verdict fails, its default may end the stream: fail closed."""
        nodes = """
            words: {function: words}
            bad: {function: breaks, each: words, stops: {words: bad}, on_error: {default: true}}
        """
        path = workflow(tmp_path, nodes, "words")
        broken = "\n\ndef breaks(text: Text) -> bool:\n    raise ValueError\n"
        (tmp_path / "workflows" / "flow.py").write_text(FUNCTIONS + broken)
        with Workflow.load(path) as flow:
            assert texts(flow([b"a wait b c d e f"])[0])[:1] == ["a"]
            functions(flow)["go"].set()

    def test_a_condition_that_raises_fails_its_request(self, tmp_path: Path) -> None:
        nodes = "words: {function: words}\ncount: {function: count, stops: {words: count.odd}}"
        with Workflow.load(workflow(tmp_path, nodes, "words")) as flow:
            failed = flow([b"a wait b"])[0]
            functions(flow)["go"].set()
        assert isinstance(failed, Failure)
        assert (failed.status, failed.node) == (500, "count")

    @pytest.mark.parametrize(
        ("stops", "message"),
        [
            ("{nobody: bad}", 'there is no other node "nobody"'),
            ("{bad: bad}", 'there is no other node "bad"'),
            ("{first: bad}", "first has ended before bad begins"),
            ("{words: words}", "here is only bad"),
            ("{words: bad ==}", "is not an expression"),
            ("{words: '3'}", "where true or false is meant"),
        ],
    )
    def test_what_cannot_be_ended_is_refused(self, tmp_path: Path, stops: str, message: str) -> None:
        nodes = f"""
            first: {{function: loud}}
            words: {{function: words, input: first}}
            bad: {{function: bad, each: words, stops: {stops}}}
        """
        assert message in problem(tmp_path, nodes, "words")


class TestRepeat:
    """A node that runs in rounds."""

    @pytest.mark.parametrize("code", ["function: grow", "workflow: inner"])
    def test_each_round_gets_the_answer_before(self, tmp_path: Path, code: str) -> None:
        workflow(tmp_path, "grow: {function: grow}", "grow", "inner")
        nodes = f"""
            count: {{function: count}}
            grow: {{{code}, input: count, repeat: {{until: grow.rounds >= 3 or grow.text == "once", most: 5}}}}
        """
        with Workflow.load(workflow(tmp_path, nodes, "grow.rounds")) as flow:
            assert flow([b"a", b"once", b"b"]) == [3, 1, 3]

    def test_the_last_round_is_the_answer(self, tmp_path: Path) -> None:
        nodes = "count: {function: count}\ngrow: {function: grow, input: count, repeat: {until: 1 > 2, most: 4}}"
        with Workflow.load(workflow(tmp_path, nodes, "grow.rounds")) as flow:
            assert flow([b"a"] * 20) == [4] * 20
            failed = flow([b"fail"])[0]
        assert isinstance(failed, Failure)
        assert failed.status == 422

    def test_each_item_has_rounds_of_its_own(self, tmp_path: Path) -> None:
        nodes = """
            told: {function: told}
            counts: {function: of, each: told}
            grow: {function: grow, each: counts, repeat: {until: len(grow.text) <= grow.rounds, most: 9}}
            give: {function: give, each: grow}
        """
        path = workflow(tmp_path, nodes, "give")
        more = "\n\ndef of(text: str) -> Count:\n    return Count(text)\n"
        (tmp_path / "workflows" / "flow.py").write_text(FUNCTIONS + more)
        with Workflow.load(path) as flow:
            assert texts(flow([b"a bbb cc"])[0]) == ["a 1", "bbb 3", "cc 2"]

    @pytest.mark.parametrize(
        ("node", "message"),
        [
            ("{function: count, repeat: {until: n.rounds == 1, most: 2}}", "count takes Text and gives Count"),
            ("{function: words, repeat: {until: len(n) > 1, most: 2}}", "yields"),
            ("{function: grow, input: first, repeat: {until: first.rounds > 1, most: 2}}", "here is only n"),
            ("{function: grow, input: first, repeat: {until: n.rounds, most: 2}}", "where true or false is meant"),
            ("{function: grow, input: first, repeat: {until: n.rounds > 1, most: 1}}", "most is 2 to 100"),
        ],
    )
    def test_rounds_that_cannot_be_are_refused(self, tmp_path: Path, node: str, message: str) -> None:
        assert message in problem(tmp_path, f"first: {{function: count}}\nn: {node}", "{first: first, n: n}")
