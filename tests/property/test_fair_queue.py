"""A queue of many requests' items loses none, keeps each request's order, and lets no request wait behind a long one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.functions import NUM, OPS, Op
from tests.property.trial import load, write
from tests.property.workflows import Flow, Run, Step
from tests.property.workflows import Path as PathTo
from torchserve_dag.runtime.engine.gather import PENDING
from torchserve_dag.runtime.engine.queue import FairQueue
from torchserve_dag.runtime.engine.request import Item, Request

ONE_STEP = Flow(
    "flow",
    NUM,
    {"n1": Step("n1", (Run(Op("do_n1", {"x": NUM}, NUM)),), {"x": PathTo("request", (), NUM)}, "default", {})},
    {"": PathTo("n1", (), NUM)},
)

Asker = Any
"""Makes a Request; given an item, the Request of the workflow that the item runs."""


@pytest.fixture(scope="module")
def asker(project: Path) -> Asker:
    with load(project, write(project, ONE_STEP)) as workflow:
        plan = workflow.engine._plans.default
    OPS.clear()

    def ask(parent: Item | None = None) -> Request:
        def end_request(request: Request, _: Any) -> None:
            request.answered = True

        return Request("", plan, 0.0, {}, lambda _: None, end_request, parent=parent)

    return ask


def item_of(request: Request, value: int) -> Item:
    node = request.plan.nodes["n1"]
    return Item(request, node, node.code, value, [PENDING], 0)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 3), st.integers(1, 20)),
        st.tuples(st.just("take"), st.integers(1, 7), st.just(0)),
        st.tuples(st.just("end"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("peek"), st.just(0), st.just(0)),
        st.tuples(st.just("drop"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=500, deadline=None, derandomize=True, print_blob=True)
@given(actions=actions)
def test_nothing_is_lost_and_each_request_keeps_its_order(
    asker: Asker, actions: Sequence[tuple[str, int, int]]
) -> None:
    queue, requests = FairQueue([]), [asker() for _ in range(4)]
    waiting: list[list[int]] = [[], [], [], []]
    numbers = iter(range(10_000))

    def check(items: Sequence[Item]) -> None:
        for item in items:
            which = requests.index(item.request.root)
            assert not item.obsolete
            assert waiting[which].pop(0) == item.value

    for what, number, count in actions:
        request = requests[number % 4]
        if what == "push":
            for _ in range(count):
                value = next(numbers)
                inside = asker(item_of(request, 0)) if value % 3 == 0 else request
                queue.push(item_of(inside, value))
                if not request.answered:
                    waiting[number].append(value)
        elif what == "take":
            check(queue.take(number))
        elif what == "peek":
            head = queue.peek()
            assert (head is None) == (not any(waiting))
            assert head is None or not head.obsolete
        elif what == "end":
            request.cancel()
            waiting[number] = []
        else:
            queue.drop_obsolete()
            assert len(queue.heap) == sum(map(len, waiting))
    check(queue.take(10_000))
    assert waiting == [[], [], [], []]
    assert len(queue.heap) == 0


@settings(max_examples=200, deadline=None, derandomize=True, print_blob=True)
@given(
    long=st.lists(st.integers(1, 1_000), min_size=1, max_size=5),
    before=st.integers(0, 1_500),
    dropped=st.booleans(),
)
def test_a_single_item_waits_for_two_of_each_long_request_at_most(
    asker: Asker, long: Sequence[int], before: int, *, dropped: bool
) -> None:
    queue = FairQueue([])
    for count in long:
        request = asker()
        for value in range(count):
            queue.push(item_of(request, value))
    queue.take(before)
    if dropped:
        queue.drop_obsolete()

    single = item_of(asker(), 0)
    queue.push(single)

    assert single in queue.take(2 * len(long) + 1)
