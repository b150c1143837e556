"""What a node that is ended early leaves behind: nothing that waits, nothing that its followers still write."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_chunks_stops_rounds import texts, workflow
from torchserve_dag import Text, Workflow

MORE = '''

entered, ended, left = threading.Event(), threading.Event(), []


@dataclass(frozen=True)
class Slow:
    """A chunk whose property is read while its node is ended."""

    text: str

    @property
    def wanted(self) -> bool:
        entered.set()
        ended.wait(10)
        return False


def slows(text: Text) -> Iterator[Slow]:
    yield Slow("a")
    yield Slow("b")


def name(slow: Slow) -> Text:
    return Text(slow.text)


def verdict(text: Text) -> bool:
    entered.wait(10)
    return True


def after(names: list[Text | Skipped]) -> list[Text | Skipped]:
    ended.set()
    return names


def names(slows: list[Slow], after: list[Text | Skipped]) -> list[Text | Skipped]:
    return [Text(slow.text) for slow in slows] + after


async def waiting(words: AsyncIterator[Text]) -> AsyncIterator[Text]:
    try:
        async for word in words:
            if word.text == "wait":
                entered.set()
            yield word
    finally:
        left.append(lock.locked())
        ended.set()


lock = None


def end(told: list[Text]) -> Text:
    return Text(f"{len(told)} {ended.wait(10)}")
'''


@pytest.fixture
def load(tmp_path: Path):
    """Loads a workflow with these nodes and this output; and the functions' module."""
    open_: list[Workflow] = []

    def load(nodes: str, output: str) -> tuple[Workflow, dict[str, Any]]:
        path = workflow(tmp_path, nodes, output)
        with (tmp_path / "workflows" / "flow.py").open("a") as functions:
            functions.write(MORE)
        flow = Workflow.load(path)
        open_.append(flow)
        module: dict[str, Any] = flow.graph.nodes["verdict"].code.kind.function.__globals__  # type: ignore[attr-defined]
        module["lock"] = flow.engine._lock
        return flow, module

    yield load
    for flow in open_:
        flow.close()


def test_a_follower_is_ended_while_the_condition_of_a_chunk_is_looked_at(load) -> None:
    flow, _ = load(
        """
            slows: {function: slows}
            named: {function: name, each: slows, when: item.wanted}
            verdict: {function: verdict, stops: {named: verdict}}
            after: {function: after, input: named}
            names: {function: names, inputs: {slows: slows, after: after}}
        """,
        "names",
    )

    assert texts(flow([b"x"])[0]) == ["a", "b"]


def test_a_function_that_waits_is_closed_at_once(load) -> None:
    """Its `finally` runs although its request goes on, and without the engine's lock."""
    flow, module = load(
        """
            words: {function: words}
            told: {function: waiting, input: words}
            verdict: {function: verdict, stops: {told: verdict}}
            end: {function: end, input: told}
        """,
        "end",
    )

    assert flow([b"a wait b"])[0].text == "2 True"
    module["go"].set()
    assert module["left"] == [False]


def test_a_stream_to_a_client_who_takes_nothing_ends_too(load) -> None:
    flow, module = load("told: {function: words}\nverdict: {function: verdict, stops: {told: verdict}}", "told")
    module["go"].set()
    taken = []

    def receive(chunk: Any, _: Any) -> int:
        taken.append(chunk)
        module["entered"].set()
        return 2**30 if len(taken) == 1 else 0

    request = flow.engine.submit(Text(" ".join("abcdefgh")), on_chunk=receive)

    assert request.future.result(15) == []
    assert texts(taken)[0] == "a"
    deadline = time.monotonic() + 10
    while not module["closed"] and time.monotonic() < deadline:
        time.sleep(0.005)
    assert module["closed"] == ["a b c d e f g h"]
