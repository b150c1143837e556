"""Of a node that another ends early there is a part of its answers, and nothing else: those that it had given by then."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from hypothesis import given
from hypothesis import strategies as st

from tests.property.functions import BAG, INT, NUM, Bag, Num, Op, listing
from tests.property.naive import naive
from tests.property.test_random_workflows import search
from tests.property.trial import LIMIT_S, left_behind, load, write
from tests.property.workflows import Compare, Constant, Flow, Run, Step
from tests.property.workflows import Path as PathTo
from torchserve_dag.runtime.messages import Skipped

Target = Literal["stream", "follower", "sentences", "each", "later"]

NUMS = PathTo("request", ("nums",), listing(NUM))
STREAM = PathTo("n1", (), listing(NUM))
ITEM = PathTo("item", (), NUM)
WHOLE = PathTo("request", (), BAG)


def flow_of(target: Target, *, follows: bool, limit: int, slow: bool) -> tuple[Flow, str]:
    """A workflow in which n3 ends a node if one of its numbers is `limit` or more; and the name of that node."""

    def run(name: str, *, feeds: frozenset[str] = frozenset(), **takes: Any) -> Run:
        yields = bool(feeds) or name == "do_n1"
        return Run(Op(name, takes, NUM, slow=slow, yields=yields, feeds=feeds))

    ended = "n1" if target == "stream" else "n2"
    stops = {ended: Compare(PathTo("n3", ("n",), INT), ">=", Constant(limit))}
    n3_takes = {"x": NUM} if follows else {"x": BAG}
    steps = {
        "n1": Step("n1", (run("do_n1", x=BAG),), {"x": WHOLE}, "inputs", {}),
        "n3": Step(
            "n3",
            (run("do_n3", **n3_takes),),
            {"x": ITEM if follows else WHOLE},
            "inputs",
            {"item": STREAM} if follows else {},
            stops=stops,
        ),
    }
    match target:
        case "follower":
            steps["n2"] = Step("n2", (run("do_n2", x=NUM),), {"x": ITEM}, "inputs", {"item": STREAM})
        case "sentences":
            feeds = frozenset({"x"})
            steps["n2"] = Step("n2", (run("do_n2", feeds=feeds, x=listing(NUM)),), {"x": STREAM}, "inputs", {})
        case "each":
            steps["n2"] = Step("n2", (run("do_n2", x=NUM),), {"x": ITEM}, "inputs", {"item": NUMS}, stopped=True)
        case "later":  # it begins once the last answer of n3 is there
            gate = PathTo("n3", (), steps["n3"].result)
            op = run("do_n2", x=NUM, y=gate.kind)
            steps["n2"] = Step("n2", (op,), {"x": ITEM, "y": gate}, "inputs", {"item": NUMS}, stopped=True)
    outputs = {name: PathTo(name, (), step.result) for name, step in steps.items()}
    return Flow("flow", BAG, steps, outputs), ended


@search(120)
@given(
    target=st.sampled_from(["stream", "follower", "sentences", "each", "later"]),
    follows=st.booleans(),
    limit=st.integers(0, 12),
    slow=st.booleans(),
    numbers=st.lists(st.integers(0, 9), max_size=6),
    together=st.integers(1, 4),
)
def test_a_node_that_is_ended_early_has_a_part_of_its_answers(
    project: Path, target: Target, *, follows: bool, limit: int, slow: bool, numbers: list[int], together: int
) -> None:
    flow, ended = flow_of(target, follows=follows, limit=limit, slow=slow)
    text = write(project, flow)
    requests = [
        Bag(sum(numbers) % 10, f"r{i}:request", [Num(n, f"r{i}:{at}") for at, n in enumerate(numbers)])
        for i in range(together)
    ]

    with load(project, text) as workflow:
        submitted = [workflow.submit(request) for request in requests]
        answers = [one.future.result(LIMIT_S) for one in submitted]
        assert not left_behind(workflow)

    for request, answer in zip(requests, answers, strict=True):
        whole = naive(flow, request, {}).answer
        verdicts = whole["n3"] if follows else [whole["n3"]]
        hit = next((i for i, verdict in enumerate(verdicts) if verdict.n >= limit), None)
        part, complete = answer[ended], whole[ended]
        if hit is None:
            assert answer == whole, text
        elif target == "later":
            assert part == [Skipped("n2")] * len(complete), text
        elif target == "each":
            assert len(part) == len(complete)
            assert all(got in (full, Skipped("n2")) for got, full in zip(part, complete, strict=True)), text
        elif target == "sentences":  # its last chunk comes at the end of the stream only
            assert part in [complete[:n] for n in range(len(complete) + 1)], text
        else:
            assert part == complete[: len(part)], text
        if target == "stream" and follows:
            assert answer["n3"] == whole["n3"][: len(part)], text
            assert hit is None or len(part) > hit, text
