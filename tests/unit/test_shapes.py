"""Every shape that a workflow can have, in process: what it answers, and in which order."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.conftest import Write
from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.runtime.messages import Failure, Skipped, Text
from torchserve_dag.runtime.workflow import Workflow

FUNCTIONS = """
def words(text: Text) -> list[Text]:
    return [Text(word) for word in text.text.split()]

def letters(text: Text) -> list[Text]:
    return [Text(letter) for letter in text.text]

def size(text: Text) -> int:
    return len(text.text)

def pair(outer: Text, inner: Text) -> str:
    return outer.text + inner.text

def loud(text: Text) -> Text:
    return Text(text.text.upper())

def quiet(text: Text) -> Text:
    return Text(text.text.lower())

def both(left: list[int], right: list[Text]) -> str:
    return f"{left} {[one.text for one in right]}"

def listed(texts: list[Text]) -> int:
    return len(texts)
"""


def other(path: Path, name: str, nodes: str, output: str = "answer") -> None:
    """Another workflow beside the one at `path`, with the same functions."""
    text = f'name: {name}\nversion: "1.0"\ndoes: A test.\ncode: flow.py\nnodes:\n{nodes}\noutput: {output}\n'
    (path.parent / f"{name}.yaml").write_text(text)


def test_loops_inside_each_other_give_lists_of_lists(write: Write) -> None:
    path = write(
        """
        words: {function: words}
        letters: {function: letters, each: words}
        answer: {function: size, each: {some: letters, letter: some}}
        """,
        FUNCTIONS,
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"ab c", b" ", b"d"]) == [[[1, 1], [1]], [], [[1]]]


def test_a_loop_over_skipped_elements_skips_them_too(write: Write) -> None:
    path = write(
        """
        words: {function: words}
        one: {function: loud, each: words, when: len(item.text) > 1}
        answer: {function: loud, each: one, when: len(item.text) > 2}
        """,
        FUNCTIONS,
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"a bb ccc"]) == [[Skipped("one"), Skipped("answer"), Text("CCC")]]


def test_an_inner_loop_reads_the_outer_element(write: Write) -> None:
    path = write(
        """
        words: {function: words}
        answer: {function: pair, each: {one: words, two: words}, inputs: {outer: one, inner: two}}
        """,
        FUNCTIONS,
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"a b"]) == [[["aa", "ab"], ["ba", "bb"]]]


def test_two_loops_are_joined_by_a_later_node(write: Write) -> None:
    path = write(
        """
        words: {function: words}
        letters: {function: letters}
        sizes: {function: size, each: words}
        louder: {function: loud, each: letters}
        answer: {function: both, inputs: {left: sizes, right: louder}}
        """,
        FUNCTIONS,
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"ab c"]) == ["[2, 1] ['A', 'B', ' ', 'C']"]


def test_a_switch_takes_the_first_branch_whose_when_is_true(write: Write) -> None:
    path = write(
        """
        answer:
          switch:
            - {when: 'parameters.how == "loud"', function: loud}
            - {when: 'parameters.how == "quiet"', handler: upper}
            - {function: quiet}
        """,
        FUNCTIONS,
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"Ab"], {"how": "loud"}) == [Text("AB")]
        assert workflow([b"Ab"]) == [Text("ab")]
        assert set(workflow.counts()) == {"request", "answer.loud", "answer.upper", "answer.quiet"}
        assert workflow.counts()["answer.upper"].items == 0


def test_each_item_takes_its_own_branch(write: Write) -> None:
    path = write(
        """
        words: {function: words}
        answer:
          each: words
          switch:
            - {when: 'item.text == "a"', function: loud}
            - {when: 'item.text == "B"', function: quiet}
        """,
        FUNCTIONS,
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"a B c"]) == [[Text("A"), Text("b"), Skipped("answer")]]


def test_a_workflow_is_a_step_of_another(write: Write) -> None:
    path = write("words: {function: words}\nanswer: {workflow: inner, each: words}", FUNCTIONS)
    other(path, "inner", "  up: {function: loud, when: len(request.text) > 1}\n  answer: {function: size, input: up}")
    with Workflow.load(path) as workflow:
        assert workflow([b"ab c", b" "]) == [[2, Skipped("up")], []]
        assert workflow.counts()["answer/up"].items == 1
        assert workflow.counts()["answer"].items == 2


def test_a_failure_inside_a_workflow_inside_names_its_node(write: Write) -> None:
    path = write(
        "answer: {workflow: inner}",
        "def fail(text: Text) -> Text: raise InputError('It is bad.', 422)",
    )
    other(path, "inner", "  answer: {function: fail}")
    with Workflow.load(path) as workflow:
        assert workflow([b"x"]) == [Failure(422, "It is bad.", "InputError", "answer/answer")]


def test_a_workflow_that_runs_itself_is_refused(write: Write) -> None:
    path = write("answer: {workflow: inner}")
    other(path, "inner", "  answer: {workflow: flow}")
    with pytest.raises(CheckError, match=r"inner\.yaml:6: answer: flow runs this workflow, so it would never end"):
        Workflow.load(path)


def test_served_workflows_that_call_each_other_are_refused(write: Write) -> None:
    path = write("answer: {served: {model: inner}}")
    other(path, "inner", "  answer: {served: {model: flow}}")
    with pytest.raises(CheckError, match=r"inner\.yaml:6: answer: flow calls this workflow, so each would wait"):
        Workflow.load(path)


def test_several_outputs_come_under_their_names(write: Write) -> None:
    path = write(
        "words: {function: words}\nsizes: {function: size, each: words}",
        FUNCTIONS,
        output="{found: words, lengths: sizes, by: parameters.by}",
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"ab c"], {"by": "me"}) == [{"found": [Text("ab"), Text("c")], "lengths": [2, 1], "by": "me"}]


def test_a_client_may_ask_for_any_node_and_only_what_it_needs_runs(write: Write) -> None:
    path = write("words: {function: words}\nsizes: {function: size, each: words}\nanswer: {function: loud}", FUNCTIONS,
                 output="{a: answer, b: sizes}")  # fmt: skip
    with Workflow.load(path) as workflow:
        asked = workflow.submit(b"ab c", options=Options(outputs=("words",)))
        unknown = workflow.submit(b"ab c", options=Options(outputs=("wrds",)))

        assert asked.future.result() == {"words": [Text("ab"), Text("c")]}
        assert unknown.future.result() == Failure(
            400, 'The header x-outputs names "wrds", and there is no such node; did you mean "words"?'
        )
        assert workflow.counts()["sizes"].items == 0


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("", Failure(422, "It is bad.", "InputError", "check")),
        ("on_error: skip", ["AB", Skipped("check"), "C"]),
        ("on_error: {default: none}", ["AB", "none", "C"]),
        ("on_error: {fallback: {function: safe}}", ["AB", "safe", "C"]),
    ],
)
def test_a_failed_item_does_what_its_nodes_policy_says(write: Write, policy: str, expected: object) -> None:
    path = write(
        f"words: {{function: words}}\ncheck: {{function: strict, each: words, {policy}}}",
        FUNCTIONS
        + """
def strict(text: Text) -> str:
    if text.text == "bad":
        raise InputError("It is bad.", 422)
    return text.text.upper()

def safe(text: Text) -> str:
    return "safe"
""",
        output="check",
    )
    with Workflow.load(path) as workflow:
        answers = workflow([b"ab bad c", b"d"])

    assert answers == [expected, ["D"]]


def test_a_surprise_is_tried_again_and_a_refusal_is_not(write: Write) -> None:
    path = write(
        "words: {function: words}\nanswer: {function: shaky, each: words, retry: 2}",
        FUNCTIONS
        + """
TRIES = []

def shaky(text: Text) -> int:
    TRIES.append(text.text)
    if text.text == "refused":
        raise InputError("No.")
    if TRIES.count(text.text) < 3:
        raise RuntimeError("not yet")
    return TRIES.count(text.text)
""",
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"a b"]) == [[3, 3]]
        refused = workflow([b"refused"])[0]
        assert (refused.status, workflow.counts()["answer"].items) == (400, 7)


def test_an_item_past_its_nodes_own_deadline_is_let_go(write: Write) -> None:
    path = write(
        "words: {function: words}\nanswer: {function: slow, each: words, timeout_s: 1, on_error: skip}",
        FUNCTIONS
        + """
def slow(text: Text) -> str:
    time.sleep(3 if text.text == "slow" else 0)
    return text.text
""",
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"a slow b"]) == [["a", Skipped("answer"), "b"]]


def test_a_clients_own_deadline_holds(write: Write, tmp_path: Path) -> None:
    path = write("answer: {function: slow}", "def slow(text: Text) -> str: wait_at(text.text); return text.text")
    with Workflow.load(path) as workflow:
        request = workflow.submit(str(tmp_path / "gate").encode(), options=Options(timeout_s=0.1))
        failure = request.future.result(30)
        (tmp_path / "gate").touch()

    assert (failure.status, failure.message, failure.node) == (408, "No answer within 0.1 s.", "answer")


STREAM = """
from collections.abc import Iterator

def tell(text: Text) -> Iterator[Text]:
    for word in text.text.split():
        if word == "bad":
            raise InputError("It is bad.")
        yield Text(word)

def loud(text: Text) -> Text:
    return Text(text.text.upper())

def listed(texts: list[Text]) -> int:
    return len(texts)
"""


@pytest.mark.parametrize(
    "nodes", ["answer: {function: tell}", "tell: {function: tell}\nanswer: {function: loud, each: tell}"]
)
def test_chunks_reach_the_client_in_order_and_once(write: Write, nodes: str) -> None:
    path = write(nodes, STREAM)
    chunks: list[Text] = []
    text = " ".join(f"w{i}" for i in range(200))
    with Workflow.load(path) as workflow:
        answer = workflow.submit(text.encode(), on_chunk=chunks.append).future.result()

        assert workflow.graph.streams
        assert [chunk.text.lower() for chunk in chunks] == text.split()
        assert answer == [], "whoever has the chunks needs no list of them"
        assert workflow([text.encode()]) == [chunks]


def test_a_node_follows_one_that_follows_another(write: Write) -> None:
    """Found by a random workflow: it was given the places of answers that were still to come."""
    path = write(
        "tell: {function: tell}\nslow: {function: slow, each: tell}\nanswer: {function: loud, each: slow}",
        STREAM
        + """
def slow(text: Text) -> Text:
    time.sleep(0.02 if text.text == "a" else 0)
    return text
""",
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"a b c"]) == [[Text("A"), Text("B"), Text("C")]]


def test_what_follows_a_skipped_stream_is_skipped(write: Write) -> None:
    path = write(
        """
        tell: {function: tell, when: request.text != "no"}
        first: {function: loud, each: tell}
        answer: {function: loud, each: first}
        """,
        STREAM,
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"no", b"a"]) == [Skipped("tell"), [Text("A")]]


def test_a_node_that_takes_the_list_waits_for_the_last_chunk(write: Write) -> None:
    path = write(
        "tell: {function: tell}\nanswer: {function: listed, input: tell}",
        STREAM,
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"a b c", b" "]) == [3, 0]
        assert not workflow.graph.streams


def test_a_failure_in_mid_stream_comes_after_the_chunks_before_it(write: Write) -> None:
    path = write("answer: {function: tell}", STREAM)
    chunks: list[Text] = []
    with Workflow.load(path) as workflow:
        failure = workflow.submit(b"a b bad c", on_chunk=chunks.append).future.result()

    assert (failure, chunks) == (Failure(400, "It is bad.", "InputError", "answer"), [Text("a"), Text("b")])


def test_a_client_that_leaves_stops_the_stream(write: Write, tmp_path: Path) -> None:
    path = write(
        "answer: {function: forever}",
        f"""
from collections.abc import Iterator
from pathlib import Path

def forever(text: Text) -> Iterator[int]:
    try:
        for i in range(10_000):
            time.sleep(0.01)
            yield i
    finally:
        Path({str(tmp_path / "left")!r}).touch()
""",
    )
    with Workflow.load(path) as workflow:
        request = workflow.submit(b"x", options=Options(cancel_key="k"), on_chunk=lambda _: workflow.engine.cancel("k"))

        assert request.future.result(60).status == 499
        assert not workflow.engine.cancel("k")
        other = workflow.submit(b"x", options=Options(timeout_s=0.05))
        assert other.future.result(60).status == 408
    assert (tmp_path / "left").exists()


def test_a_cancel_key_that_is_used_twice_cancels_both(write: Write, tmp_path: Path) -> None:
    path = write("answer: {function: slow}", "def slow(text: Text) -> str: wait_at(text.text); return text.text")
    with Workflow.load(path) as workflow:
        gate = str(tmp_path / "gate").encode()
        first, second = (workflow.submit(gate, options=Options(cancel_key="k")) for _ in range(2))
        other = workflow.submit(gate, options=Options(cancel_key="another"))

        assert workflow.engine.cancel("k")
        assert [one.future.result(60).status for one in (first, second)] == [499, 499]
        assert not workflow.engine.cancel("k")
        (tmp_path / "gate").touch()
        assert other.future.result(60) == str(tmp_path / "gate")


def test_an_interactive_request_passes_bulk_ones_which_still_come_through(write: Write) -> None:
    order: list[str] = []
    path = write("answer: {function: work}", "def work(text: Text) -> Text: time.sleep(0.005); return text")
    with Workflow.load(path) as workflow:
        with workflow.engine.together():
            bulk = [workflow.submit(b"bulk", options=Options(priority="bulk")) for _ in range(60)]
            quick = [workflow.submit(b"quick") for _ in range(20)]
        for request in (*bulk, *quick):
            request.future.add_done_callback(lambda future: order.append(future.result().text))
        for request in (*bulk, *quick):
            request.future.result()

    last_quick = len(order) - order[::-1].index("quick")
    assert last_quick < 50  # of 80; in their order of arrival it would be the last
    assert "bulk" in order[:last_quick]


def test_branches_and_a_fallback_of_one_name_are_kept_apart(write: Write) -> None:
    functions = FUNCTIONS + "\ndef fallback(text: Text) -> Text: return Text('one')\n"
    path = write(
        """
        answer:
          switch:
            - {when: 'request.text == "x"', function: fallback}
            - {function: loud}
          on_error: {fallback: {function: quiet}}
        """,
        functions,
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"x", b"y"]) == [Text("one"), Text("Y")]


def test_leaving_a_stream_lets_its_finally_use_the_engine(write: Write) -> None:
    """It runs where the stream's last chunk is let go of: never while the engine's lock is held."""
    path = write(
        "answer: {function: forever}",
        """
from collections.abc import Iterator

LEFT = []

def forever(text: Text) -> Iterator[int]:
    try:
        while True:
            time.sleep(0.001)
            yield 1
    finally:
        LEFT[0]()
""",
    )
    with Workflow.load(path) as workflow:
        left, cancelled = threading.Event(), []

        def leave() -> None:
            cancelled.append(workflow.engine.cancel("not there"))
            left.set()

        sys.modules[workflow.graph.nodes["answer"].code.kind.function.__module__].LEFT.append(leave)
        for _ in range(20):  # it may wait in the queue when it is cancelled, or be in a lane
            left.clear()
            begun = threading.Event()
            request = workflow.submit(b"x", on_chunk=lambda _, begun=begun: begun.set())
            assert begun.wait(5)
            request.cancel()
            assert left.wait(5)
    assert cancelled == [False] * 20


def test_a_chunk_that_cannot_be_given_fails_the_stream_and_ends_it(write: Write) -> None:
    """Also where the last chunk was ready before the first could not be given."""
    path = write("tell: {function: tell}\nanswer: {function: loud, each: tell}", STREAM)
    for raised in (OSError, SystemExit):
        given: list[object] = []
        hold = threading.Event()

        def give(
            chunk: object, given: list[object] = given, raised: type = raised, hold: threading.Event = hold
        ) -> None:
            given.append(chunk)
            hold.wait(5)
            raise raised

        with Workflow.load(path) as workflow:
            request = workflow.submit(b"a b c", on_chunk=give)
            wait_for(lambda workflow=workflow: not workflow.engine.in_flight)
            hold.set()
            failure = request.future.result(5)
            assert (failure.status, len(given)) == (500, 1)
            assert workflow([b"d"]) == [[Text("D")]]


def test_workflows_inside_that_end_at_once_may_follow_each_other_for_long(write: Write) -> None:
    """What ends while it is being started must not pile up the stack."""
    count = 300
    nodes = [f"n{i}: {{workflow: inner, input: {f'n{i - 1}' if i else 'words'}}}" for i in range(count)]
    functions = (
        FUNCTIONS
        + """
def same(texts: list[Text | Skipped]) -> list[Text | Skipped]: return texts
def first(text: Text | Skipped, others: list[Text | Skipped]) -> Text | Skipped: return text
"""
    )
    path = write("\n".join(["words: {function: words}", *nodes]), functions, output=f"n{count - 1}")
    inner = """
  long: {function: same, when: len(request) > 1}
  each: {function: first, each: request, inputs: {text: item, others: long}}
"""
    other(path, "inner", inner, "each")
    with Workflow.load(path) as workflow:
        assert workflow([b" ", b"a b", b" "]) == [[], [Text("a"), Text("b")], []]
        # A lane counts what it has done when it looks for more, which may be after the answer has left.
        deadline = time.monotonic() + 60
        while any(station.in_flight for station in workflow.engine._stations.values()):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_request_of_thousands_of_items_leaves_the_others_their_turns(write: Write) -> None:
    path = write(
        """
        words: {function: words}
        slow: {function: slow, each: words}
        answer: {function: listed, input: slow}
        """,
        FUNCTIONS + "\ndef slow(text: Text) -> Text: time.sleep(0.002); return text\n",
    )
    with Workflow.load(path) as workflow:
        large = workflow.submit(b"w " * 2_000)
        wait_for(lambda: workflow.engine.counts()["slow"].items > 20)

        for _ in range(3):
            assert workflow([b"a"]) == [1]
        assert workflow.engine.counts()["slow"].items < 1_000
        assert large.future.result(60) == 2_000


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
