"""The engine runs graphs: order, batches across requests, failures, time limits."""

from __future__ import annotations

import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import pytest

from tests.unit.conftest import CARD, IMPORTS, Write
from torchserve_dag.runtime.engine.request import Request
from torchserve_dag.runtime.graph.types import fits
from torchserve_dag.runtime.messages import Failure, Text
from torchserve_dag.runtime.workflow import Workflow

EACH = """
    split: {handler: words}
    word: {function: word_text, each: split.words}
    upper: {handler: upper, each: word, batch: 8}
    answer: {function: join, input: upper}
"""
EACH_FUNCTIONS = """
    def word_text(word: object) -> Text: return Text(word.text)
    def join(texts: list[Text]) -> Text: return Text("-".join(t.text for t in texts))
"""


def test_a_handler_alone_is_a_workflow_of_one_node(project: Path) -> None:
    with Workflow.load(project / "handlers" / "upper.yaml") as upper:
        assert upper([Text("a"), b"b"]) == [Text("A"), Text("B")]


def test_a_sequence_hands_each_result_on(write: Write) -> None:
    path = write(
        """
        upper: {handler: upper}
        answer: {function: twice, input: upper}
    """,
        "def twice(text: Text) -> Text: return Text(text.text * 2)",
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"ab"]) == [Text("ABAB")]


def test_parallel_nodes_join_in_a_node_that_takes_both(write: Write) -> None:
    path = write(
        """
        upper: {handler: upper}
        size: {function: size}
        answer: {function: both, inputs: {text: upper, count: size}}
    """,
        """
        def size(text: Text) -> int: return len(text.text)
        def both(text: Text, count: int) -> Text: return Text(f"{text.text}:{count}")
    """,
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"abc"]) == [Text("ABC:3")]


def test_parallel_nodes_run_at_the_same_time(write: Write) -> None:
    path = write(
        """
        one: {function: meet}
        two: {function: meet}
        answer: {function: both, inputs: {one: one, two: two}}
    """,
        """
        import threading
        barrier = threading.Barrier(2, timeout=60)
        def meet(text: Text) -> int: return barrier.wait() * 0 + 1
        def both(one: int, two: int) -> int: return one + two
    """,
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"x"]) == [2]


def test_each_fans_out_and_gathers_in_order(write: Write) -> None:
    with Workflow.load(write(EACH, EACH_FUNCTIONS)) as workflow:
        assert workflow([b"a b c", b"d"]) == [Text("A-B-C"), Text("D")]


def test_an_empty_list_is_an_ordinary_result(write: Write) -> None:
    with Workflow.load(write(EACH, EACH_FUNCTIONS)) as workflow:
        assert workflow([b"  "]) == [Text("")]


def test_items_of_different_requests_share_batches(write: Write) -> None:
    """Items that queue while the lanes are busy leave in full batches, whichever request they are of."""
    with Workflow.load(write(EACH, EACH_FUNCTIONS)) as workflow:
        answers = workflow([b"a b c d"] * 40)
        counts = workflow.counts()["upper"]

    assert answers == [Text("A-B-C-D")] * 40
    assert counts.items == 160
    assert counts.batches < 60


def test_when_skips_an_item_and_what_follows_sees_it(write: Write) -> None:
    path = write(
        """
        split: {handler: words}
        word: {function: word_text, each: split.words, when: item.size > 1}
        upper: {handler: upper, each: word}
        answer: {function: join, input: upper}
    """,
        """
        def word_text(word: object) -> Text: return Text(word.text)
        def join(texts: list[Text | Skipped]) -> Text:
            return Text("-".join("?" if isinstance(t, Skipped) else t.text for t in texts))
    """,
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"aa b cc"]) == [Text("AA-?-CC")]


def test_parameters_reach_any_node(write: Write) -> None:
    path = write(
        """
        upper: {handler: upper}
        answer: {function: sign, inputs: {text: upper, by: parameters.by}}
    """,
        "def sign(text: Text, by: str | None) -> Text: return Text(f'{text.text} ({by})')",
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"a"], {"by": "me"}) == [Text("A (me)")]
        assert workflow([b"a"]) == [Text("A (None)")]


def test_a_bad_request_touches_no_other(write: Write) -> None:
    with Workflow.load(write(EACH, EACH_FUNCTIONS)) as workflow:
        answers = workflow([b"a", b"x bad", b"b", b"poison", b"", b"c"])

    assert [a for a in answers if isinstance(a, Text)] == [Text("A"), Text("B"), Text("C")]
    assert answers[1] == Failure(422, "That text is bad.", "InputError", "upper")
    assert (answers[3].status, answers[3].node) == (500, "upper")
    assert (answers[4].status, answers[4].node) == (400, None)


def test_a_function_that_raises_ends_only_its_request(write: Write) -> None:
    path = write(
        "answer: {function: fail}",
        """
        def fail(text: Text) -> Text:
            if text.text == "x": raise KeyError("x")
            return text
    """,
    )
    with Workflow.load(path) as workflow:
        good, bad = workflow([b"ok", b"x"])

    assert good == Text("ok")
    assert (bad.status, bad.node) == (500, "answer")
    assert "KeyError" not in bad.message


def test_a_request_is_answered_at_its_time_limit_and_the_worker_known_to_hang(write: Write) -> None:
    path = write("answer: {handler: upper}", more="serve: {timeout_s: 2}")
    with Workflow.load(path) as workflow:
        begin = time.monotonic()
        slow, quick = workflow([b"slow", b"quick"])

        assert quick == Text("QUICK")
        assert (slow.status, slow.node) == (504, "answer")
        assert time.monotonic() - begin < 20
        wait_for(workflow.engine.hangs)


def test_closing_answers_what_is_inside_and_ends_the_threads(write: Write) -> None:
    before = set(threading.enumerate())
    workflow = Workflow.load(
        write(
            "answer: {function: wait}",
            """
        def wait(text: Text) -> Text:
            time.sleep(0.2)
            return text
    """,
        )
    )
    futures = [workflow.submit(b"x").future for _ in range(20)]
    workflow.close()

    assert all(f.done() for f in futures)
    assert {f.result().status for f in futures if isinstance(f.result(), Failure)} == {503}
    assert set(threading.enumerate()) <= before


def test_past_the_limit_of_requests_inside_the_next_is_refused_at_once(write: Write) -> None:
    path = write(
        "answer: {function: wait}",
        """
        def wait(text: Text) -> Text:
            time.sleep(1)
            return text
    """,
        more="serve: {max_inside: 3}",
    )
    with Workflow.load(path) as workflow:
        answers = [future.result() for future in [workflow.submit(b"x").future for _ in range(5)]]

    assert [a for a in answers if isinstance(a, Text)] == [Text("x")] * 3
    assert {a.status for a in answers if isinstance(a, Failure)} == {503}


def test_a_thousand_items_keep_their_order(write: Write) -> None:
    words = [f"w{i}" for i in range(1000)]
    with Workflow.load(write(EACH, EACH_FUNCTIONS)) as workflow:
        (answer,) = workflow([" ".join(words).encode()])

    assert answer == Text("-".join(w.upper() for w in words))


def test_a_skipped_node_is_the_answer_of_what_needs_it(write: Write) -> None:
    path = write(
        """
        upper: {handler: upper, when: request.text != "no"}
        answer: {function: end, input: upper}
    """,
        "def end(text: Text | Skipped) -> bool: return isinstance(text, Skipped)",
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"no", b"yes"]) == [True, False]


def test_a_fan_out_over_too_many_elements_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchserve_dag.runtime.engine.fan_out.MAX_ELEMENTS", 5)
    with Workflow.load(write(EACH, EACH_FUNCTIONS)) as workflow:
        many, few = workflow([b"a b c d e f", b"a b"])

    assert (many.status, many.node) == (422, "word")
    assert "6 elements" in many.message
    assert few == Text("A-B")


def test_a_long_list_of_requests_is_answered_whole(write: Write) -> None:
    """More requests than may be in flight, and than the lanes can run within one time limit."""
    with Workflow.load(write("answer: {handler: upper}", more="serve: {max_inside: 20}")) as workflow:
        answers = workflow([f"t{i}".encode() for i in range(500)])

    assert answers == [Text(f"T{i}") for i in range(500)]


def test_a_panic_of_a_library_does_not_end_a_lane(write: Write) -> None:
    """What Rust's panics become in Python is no Exception."""
    path = write("answer: {function: fail}", """
        class Panic(BaseException): pass
        def fail(text: Text) -> Text:
            if text.text == "x": raise Panic()
            return text
    """)  # fmt: skip
    with Workflow.load(path) as workflow:
        answers = workflow([b"x"] * 10 + [b"ok"])

    assert {answer.status for answer in answers[:10]} == {500}
    assert answers[10] == Text("ok")


def test_a_fault_of_the_engine_itself_costs_its_requests_and_no_lane(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [True] * 4  # as many as there are lanes, and more

    def record_run(*_: object) -> None:
        if broken:
            broken.pop()
            raise TypeError("a fault")

    path = write("answer: {function: loud}", "def loud(text: Text) -> Text: return Text(text.text.upper())")
    with Workflow.load(path) as workflow:
        monkeypatch.setattr(workflow.engine._stations["answer"], "record_run", record_run)
        failures = [workflow([b"a"])[0] for _ in range(4)]
        assert workflow([b"a"])[0] == Text("A")

    assert {(failure.status, failure.node, failure.type) for failure in failures} == {(500, "answer", "InternalError")}


def test_nodes_that_run_one_handler_share_its_weights(write: Write) -> None:
    path = write("""
        one: {handler: upper}
        answer: {handler: upper, input: one}
    """)
    with Workflow.load(path) as workflow:
        assert workflow._loaded["one"].runner is workflow._loaded["answer"].runner


def test_an_answered_request_is_let_go_of_at_once(write: Write) -> None:
    """Photos are large: its deadline, half a minute away, does not keep it."""
    with Workflow.load(write("answer: {handler: upper, timeout_s: 20}")) as workflow:
        request = workflow.submit(b"a")
        assert request.future.result() == Text("A")
        gone = weakref.ref(request)
        del request
        deadline = time.monotonic() + 60
        while gone() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert gone() is None


@pytest.mark.parametrize(
    ("have", "want", "fit"),
    [
        (tuple[int, int], tuple[int, int], True),
        (tuple[int, int], tuple[int, int, int], False),
        (tuple[int, int], tuple[int, ...], True),
        (tuple[int, ...], tuple[int, int], False),
        (tuple[int, str], Sequence[int], False),
        (tuple[int, int], Sequence[float], True),
        (str, Sequence[int], False),
        (str, Sequence[str], True),
        (list[int], Sequence[float], True),
        (dict[str, int], Mapping[str, float], True),
        (Literal["a"], str, True),
        (Literal["a"], int, False),
        (Literal["a"], Literal["a", "b"], True),
        (Literal["c"], Literal["a", "b"], False),
        (str, Literal["a"], False),
        (int | None, int, False),
        (int, int | None, True),
    ],
)
def test_what_may_go_along_an_edge(have: object, want: object, fit: bool) -> None:  # noqa: FBT001
    assert fits(have, want) == fit


ALONE = """
    import threading
    from torchserve_dag.runtime.compute.cores import alone
    both = threading.Barrier(2)
    class Told(Handler[Text, str, str, Text]):
        def load(self, folder, settings, placement): pass
        def example(self) -> Text: return Text("one")
        def preprocess(self, item: Text) -> str: return item.text
        def infer(self, batch):
            if "together" in batch: both.wait(10)
            return [str(alone()) for _ in batch]
        def postprocess(self, output: str, item: Text) -> Text: return Text(output)
"""


def test_a_request_that_is_alone_may_use_every_core(write: Write, project: Path) -> None:
    (project / "handlers" / "told.py").write_text(IMPORTS + textwrap.dedent(ALONE))
    (project / "handlers" / "told.yaml").write_text(f'name: told\nversion: "1.0"\n{CARD}')
    with Workflow.load(write("answer: {handler: told}\n")) as workflow:
        assert workflow([b"one"]) == [Text("True")]
        if len(workflow.engine._lanes["cpu"].threads) > 1:
            assert Text("False") in workflow([b"together", b"together"])
        assert workflow([b"one"]) == [Text("True")]


def test_what_is_submitted_together_enters_at_the_end(write: Write) -> None:
    with Workflow.load(write("answer: {handler: upper}\n")) as workflow:
        with workflow.engine.together():
            requests = [workflow.submit(b"a"), workflow.submit(b"b")]
            time.sleep(0.05)
            assert not any(request.future.done() for request in requests)
        assert [request.future.result(60) for request in requests] == [Text("A"), Text("B")]
        assert workflow([b"c"]) == [Text("C")]


def test_what_is_submitted_before_an_error_enters_too(write: Write) -> None:
    with Workflow.load(write("answer: {handler: upper}\n")) as workflow:
        requests: list[Request] = []

        def submit_and_fail() -> None:
            with workflow.engine.together():
                requests.append(workflow.submit(b"a"))
                raise KeyError

        with pytest.raises(KeyError):
            submit_and_fail()
        assert requests[0].future.result(60) == Text("A")


def test_a_quick_function_that_becomes_slow_holds_up_no_neighbour_that_has_a_lane(write: Write, tmp_path: Path) -> None:
    """Quick functions are done in bundles: one of two requests that could have a lane each must not wait in one."""
    path = write(
        "answer: {function: wait}\n",
        """
        def wait(text: Text) -> Text:
            if text.text.startswith("gate "): wait_at(text.text[5:])
            return text
        """,
    )
    with Workflow.load(path) as workflow:
        if len(workflow.engine._lanes["cpu"].threads) < 2:
            pytest.skip("one core")
        workflow([b"quick"] * 200)
        gate = tmp_path / "gate"
        with workflow.engine.together():
            slow, quick = workflow.submit(f"gate {gate}".encode()), workflow.submit(b"quick")
        assert quick.future.result(30) == Text("quick")
        assert not slow.future.done()
        gate.touch()
        assert slow.future.result(60) == Text(f"gate {gate}")


def wait_for(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
