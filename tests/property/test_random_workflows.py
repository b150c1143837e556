"""Random workflows answer as a naive executor does, which runs one request, one node and one item at a time.

`EXAMPLES=5000` searches further, and at random.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.property.functions import BAG, HANDLERS, NUM, Bag, Num, Op, listing, make, shared
from tests.property.trial import (
    LIMIT_S,
    ask_all,
    handled_too_many,
    left_behind,
    load,
    miscounted,
    misreported,
    report,
    threads_left,
    write,
    wrong_with,
)
from tests.property.workflows import Flow, Otherwise, Run, Step, asks, flows
from tests.property.workflows import Path as PathTo
from torchserve_dag.runtime import logs
from torchserve_dag.runtime.messages import Failure, Skipped

MORE = int(os.environ.get("EXAMPLES", "0"))


def search(examples: int) -> Callable[[Any], Any]:
    """Settings for a number of examples, the same examples in every run."""
    return settings(
        max_examples=MORE or examples,
        derandomize=not MORE,
        deadline=None,
        print_blob=True,
        phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
        suppress_health_check=[*HealthCheck],
    )


@pytest.mark.timeout(1800)  # shrinking a failing example takes minutes
@search(400)
@given(data=st.data())
def test_answers_and_failures_and_calls_are_those_of_the_naive_executor(project: Path, data: st.DataObject) -> None:
    flow = data.draw(flows())
    chosen = data.draw(st.lists(asks(flow), min_size=1, max_size=6))
    text = write(project, flow)
    before = set(threading.enumerate())

    with load(project, text) as workflow:
        loaded = set(threading.enumerate())
        asked = ask_all(workflow, flow, chosen)
        for one in asked:
            one.answer = one.request.future.result(LIMIT_S)
        problems = left_behind(workflow)
        begun = {thread.name for thread in set(threading.enumerate()) - loaded}
        problems += [
            f"an additional thread: {name}" for name in begun if not name.startswith(("picky-", logs.COUNTER))
        ]  # of its micro-batches
        problems += misreported(workflow, flow)

    problems += threads_left(before)
    problems += [f"{one.tag}: {problem}" for one in asked for problem in wrong_with(one)]
    problems += miscounted(asked) + handled_too_many(flow)
    assert not problems, report(text, asked, problems)


@pytest.mark.timeout(1800)
@search(60)
@given(data=st.data(), after_s=st.integers(0, 20).map(lambda ms: ms / 1000))
def test_closing_at_any_moment_answers_every_request_and_ends_the_threads(
    project: Path, data: st.DataObject, after_s: float
) -> None:
    flow = data.draw(flows())
    chosen = data.draw(st.lists(asks(flow, patient=True), min_size=1, max_size=12))
    text = write(project, flow)
    before = set(threading.enumerate())

    workflow = load(project, text)
    asked = ask_all(workflow, flow, chosen)
    time.sleep(after_s)
    workflow.close()

    problems = [f"{one.tag} has no answer" for one in asked if not one.request.future.done()]
    problems += threads_left(before)
    for one in asked:
        one.answer = one.request.future.result(LIMIT_S)
        if not (isinstance(one.answer, Failure) and one.answer.status == 503):
            problems += [f"{one.tag}: {problem}" for problem in wrong_with(one)]
    assert not problems, report(text, asked, problems)


@search(60)
@given(
    numbers=st.lists(st.integers(0, 9), max_size=6),
    timeout_s=st.integers(1, 6).map(lambda ms: ms / 1000),
    retry=st.integers(0, 2),
    policy=st.sampled_from(["fail", "skip", "default", "fallback"]),
)
def test_an_item_that_reaches_its_node_s_deadline_has_its_answer_or_what_stands_in_for_it(
    project: Path, numbers: list[int], timeout_s: float, retry: int, policy: Otherwise
) -> None:
    slow = Op("do_n1", {"x": NUM, "y": BAG}, NUM, slow=True)
    instead = Op("n1_instead", slow.takes, NUM)
    step = Step(
        "n1",
        (Run(slow),),
        {"x": PathTo("item", (), NUM), "y": PathTo("request", (), BAG)},
        "inputs",
        {"item": PathTo("request", ("nums",), listing(NUM))},
        timeout_s=timeout_s,
        retry=retry,
        on_error=policy,
        default=Num(1, "default"),
        fallbacks=(Run(instead),) if policy == "fallback" else (),
    )
    text = write(project, Flow("flow", BAG, {"n1": step}, {"": PathTo("n1", (), step.result)}))
    request = Bag(0, "r:request", [Num(n, f"r:{i}") for i, n in enumerate(numbers)])

    with load(project, text) as workflow:
        answer = workflow.submit(request).future.result(LIMIT_S)
        assert not left_behind(workflow)

    if policy in {"fail", "fallback"} and isinstance(answer, Failure):  # a fallback has the same deadline
        assert (answer.status, answer.node) == (504, "n1" if policy == "fail" else "n1.fallback")
        return
    assert len(answer) == len(numbers)
    for num, got in zip(request.nums, answer, strict=True):
        wanted, others = (make(NUM, *op.digit_and_id({"x": num, "y": request})) for op in (slow, instead))
        stand_in = {"skip": Skipped("n1"), "default": step.default, "fallback": others}.get(policy)
        assert got in (wanted, stand_in), text
        assert shared.calls[slow.name, wanted.id] <= 1 + retry
        assert shared.calls[instead.name, others.id] <= 1


def test_items_of_a_handler_go_in_batches(project: Path) -> None:
    levels = {"outer": PathTo("request", ("nums",), listing(NUM)), "inner": PathTo("request", ("nums",), listing(NUM))}
    inner = Step("n1", (Run(handler="plain", batch=5),), {"x": PathTo("inner", (), NUM)}, "default", levels)
    whole = Op("do_n2", {"x": inner.result, "y": BAG}, NUM)
    last = Step(
        "n2", (Run(whole),), {"x": PathTo("n1", (), inner.result), "y": PathTo("request", (), BAG)}, "inputs", {}
    )
    write(project, Flow("flow", BAG, {"n1": inner, "n2": last}, {"": PathTo("n2", (), NUM)}))
    request = make(BAG, 8, "r:request")

    with load(project, "") as workflow:
        answer = workflow.submit(request).future.result(LIMIT_S)

    one = [make(NUM, *HANDLERS["plain"].digit_and_id({"item": num})) for num in request.nums]
    assert answer == make(NUM, *whole.digit_and_id({"x": [one] * len(one), "y": request}))
    assert 1 < shared.largest["plain"] <= 5
