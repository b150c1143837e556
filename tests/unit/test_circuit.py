"""Several fallbacks, one after the other, each with attempts of its own; and code that is not tried for a while."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_chunks_stops_rounds import problem, texts, workflow
from torchserve_dag import Failure, Text, Workflow
from torchserve_dag.runtime.engine.circuit import Breaker
from torchserve_dag.runtime.graph.graph import Circuit

MORE = '''

import time

calls = {"first": 0, "second": 0}
broken = {"first", "second"}
status = 503


class AwayError(InputError):
    """It is away."""


def first(text: Text) -> Text:
    return answered("first", text)


def second(text: Text) -> Text:
    return answered("second", text)


def answered(name: str, text: Text) -> Text:
    calls[name] += 1
    if name in broken:
        raise AwayError(f"{name} is away.", status)
    return Text(f"{name} {text.text}")


def yielded(text: Text) -> Iterator[Text]:
    yield first(text)


def breaks_off(text: Text) -> Iterator[Text]:
    calls["first"] += 1
    yield text
    raise AwayError("It broke off.", 503)


def late(text: Text) -> Text:
    """Answers once its attempt has been given up; but "quick" at once."""
    calls["first"] += 1
    if text.text != "quick":
        time.sleep(0.4)
    return text


def silent(text: Text) -> Iterator[Text]:
    go.wait(20)
    yield text


def canned(text: Text) -> Text:
    return Text("Sorry.")
'''

CHAIN = """
    ask:
      function: first
      retry: 1
      on_error:
        fallback:
          - {function: second, retry: 2}
          - {function: canned}
"""


@pytest.fixture
def load(tmp_path: Path):
    """Loads a workflow with these nodes and `ask` as its output; and the functions' module."""
    open_: list[Workflow] = []

    def load(nodes: str) -> tuple[Workflow, dict[str, Any]]:
        path = workflow(tmp_path, nodes, "ask")
        with (tmp_path / "workflows" / "flow.py").open("a") as functions:
            functions.write(MORE)
        flow = Workflow.load(path)
        open_.append(flow)
        return flow, flow.graph.nodes["ask"].code.kind.function.__globals__  # type: ignore[attr-defined]

    yield load
    for flow in open_:
        flow.close()


def test_each_fallback_has_attempts_of_its_own(load) -> None:
    flow, module = load(CHAIN)

    assert flow([b"a"])[0].text == "Sorry."
    assert module["calls"] == {"first": 2, "second": 3}
    module["broken"].discard("second")
    assert flow([b"a"])[0].text == "second a"
    module["broken"].clear()
    assert flow([b"a"])[0].text == "first a"
    assert set(flow.counts()) >= {"ask", "ask.fallback_1", "ask.fallback_2"}


def test_where_the_last_fails_the_request_does(load) -> None:
    flow, _ = load("ask: {function: first, on_error: {fallback: [{function: second}]}}")

    failed = flow([b"a"])[0]

    assert isinstance(failed, Failure)
    assert (failed.status, failed.message, failed.node) == (503, "second is away.", "ask.fallback")


def test_a_stream_has_several_fallbacks_too(load) -> None:
    flow, module = load("ask: {function: yielded, on_error: {fallback: [{function: second}, {function: canned}]}}")

    assert texts(flow([b"a"])[0]) == ["Sorry."]
    module["broken"].clear()
    assert texts(flow([b"a"])[0]) == ["first a"]


CIRCUIT = """
    ask: {function: first, circuit: {failures: 3, open_s: 0.5}, on_error: {fallback: {function: canned}}}
"""


def test_what_fails_again_and_again_is_not_tried_for_a_while(load) -> None:
    flow, module = load(CIRCUIT)
    calls = module["calls"]

    for _ in range(10):
        assert flow([b"a"])[0].text == "Sorry."
    assert calls["first"] == 3
    time.sleep(0.6)
    assert texts(flow([b"a"] * 4)) == ["Sorry."] * 4  # one is tried, and fails
    assert calls["first"] == 4
    module["broken"].clear()
    time.sleep(0.6)
    assert flow([b"a"])[0].text == "first a"
    assert texts(flow([b"a"] * 4)) == ["first a"] * 4


def test_without_a_fallback_the_client_is_told(load) -> None:
    flow, _ = load("ask: {function: first, retry: 1, circuit: {failures: 2, open_s: 30}}")

    flow([b"a"])
    failed = flow([b"a"])[0]

    assert isinstance(failed, Failure)
    assert (failed.status, failed.type) == (503, "CircuitOpen")
    assert failed.message == "ask is not tried for 30 s more: 2 or more attempts in a row have failed."


def test_what_the_sender_must_mend_opens_no_circuit(load) -> None:
    flow, module = load("ask: {function: first, circuit: {failures: 1, open_s: 30}}")
    module["status"] = 422

    assert [answer.status for answer in flow([b"a"] * 5)] == [422] * 5


def test_a_time_out_counts(load) -> None:
    flow, module = load(
        "ask: {function: slow, timeout_s: 0.1, circuit: {failures: 1, open_s: 30}, on_error: {fallback: {function: canned}}}"
    )

    assert flow([b"a"])[0].text == "Sorry."
    began = time.monotonic()
    assert flow([b"a"])[0].text == "Sorry."
    assert time.monotonic() - began < 5
    module["go"].set()


def test_an_answer_that_comes_too_late_closes_no_circuit(load) -> None:
    nodes = "ask: {function: late, timeout_s: 0.1, circuit: {failures: 2, open_s: 30}}"
    flow, module = load(nodes)

    failed = []
    for _ in range(3):
        failed += flow([b"a"])
        time.sleep(0.6)  # its late answer comes

    assert [one.type for one in failed] == ["Timeout", "Timeout", "CircuitOpen"]
    assert module["calls"]["first"] == 2
    assert flow.counts()["ask"].failures == 3


def test_a_stream_that_breaks_off_again_and_again_opens_the_circuit(load) -> None:
    flow, module = load("ask: {function: breaks_off, circuit: {failures: 2, open_s: 30}}")

    failed = [flow([b"a"])[0] for _ in range(3)]

    assert [one.type for one in failed] == ["InputError"] * 2 + ["CircuitOpen"]
    assert module["calls"]["first"] == 2


def test_each_attempt_counts(load) -> None:
    """A retry finds the circuit that the attempts before it have opened."""
    flow, module = load("ask: {function: first, retry: 5, circuit: {failures: 3, open_s: 30}}")

    failed = flow([b"a"])[0]

    assert failed.type == "CircuitOpen"
    assert module["calls"]["first"] == 3


def test_after_an_attempt_that_nobody_waited_for_another_decides(load) -> None:
    """The one item that is tried is cancelled: the circuit does not stay open for ever."""
    flow, _ = load("ask: {function: late, timeout_s: 0.1, circuit: {failures: 1, open_s: 0.3}}")
    flow([b"a"])
    time.sleep(0.4)
    tried = flow.submit(Text("a"))
    tried.cancel()
    time.sleep(0.7)

    assert flow([b"quick"])[0].text == "quick"
    assert flow([b"quick"])[0].text == "quick"


def test_a_limit_for_the_first_chunk_lets_an_answer_go_on(load) -> None:
    """`words` waits for `go` after the chunk "wait", longer than the limit."""
    flow, module = load("ask: {function: words, first_chunk_s: 0.5, on_error: {fallback: {function: canned}}}")
    threading.Timer(1, module["go"].set).start()

    assert texts(flow([b"a wait b"])[0]) == ["a", "wait", "b"]


def test_a_stream_that_does_not_begin_in_time_has_a_fallback(load) -> None:
    flow, module = load("ask: {function: silent, first_chunk_s: 0.2, on_error: {fallback: {function: canned}}}")

    assert texts(flow([b"a"])[0]) == ["Sorry."]
    module["go"].set()


def test_a_fallback_may_be_for_transient_failures_only(load) -> None:
    flow, module = load("ask: {function: first, on_error: {fallback: [{function: canned, after: transient}]}}")

    assert flow([b"a"])[0].text == "Sorry."
    module["status"] = 422
    failed = flow([b"a"])[0]
    assert isinstance(failed, Failure)
    assert (failed.status, failed.message) == (422, "first is away.")


def test_a_circuit_closes_with_one_success() -> None:
    breaker = Breaker(Circuit(failures=2, open_s=10))
    away = Failure(503, "It is away.")

    breaker.record(away, 0)
    assert breaker.admits(0)
    breaker.record(away, 1)
    assert [breaker.admits(now) for now in (1, 10.9, 11, 11.1)] == [False, False, True, False]
    breaker.record(None, 12)
    assert breaker.admits(12)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("circuit: {failures: 0}", "failures is at least 1"),
        ("circuit: {open_s: 0}", "open_s is a number of seconds"),
        ("first_chunk_s: 1", "gives no chunks"),
        ("on_error: {fallback: [{function: loud, first_chunk_s: 0}]}", "first_chunk_s is a number of seconds"),
        ("on_error: {fallback: [{function: loud, after: some}]}", "after"),
        ("on_error: {fallback: []}", "there is no code in it"),
        ("on_error: {fallback: [{function: words}]}", "yields, and what it stands in for does not"),
        ("on_error: {fallback: [{function: nobody}]}", 'has no function "nobody"'),
        ("on_error: {fallback: [{function: loud, retry: 11}]}", "retry is 0 to 10"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, policy: str, message: str) -> None:
    assert message in problem(tmp_path, f"ask: {{function: loud, {policy}}}", "ask")
