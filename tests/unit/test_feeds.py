"""Functions over chunks where attempts fail, chunks are skipped, and nodes read what they also take as it comes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_chunks_stops_rounds import texts, workflow
from torchserve_dag import Failure, Text, Workflow

MORE = '''

import time

tries = {"flaky": 0, "waits": 0, "late": 0}
locked = []


class AwayError(InputError):
    """It is away."""


async def flaky(words: AsyncIterator[Text]) -> AsyncIterator[Text]:
    """Takes a word, and fails in its first attempt."""
    tries["flaky"] += 1
    first = await anext(words)
    if tries["flaky"] == 1:
        raise AwayError("Once.", 503)
    yield first
    async for word in words:
        yield word


async def waits(words: AsyncIterator[Text]) -> AsyncIterator[Text]:
    """Gathers all words; its first attempt never sees their end in time."""
    tries["waits"] += 1
    held = [word.text async for word in words]
    yield Text(" ".join(held))


async def guarded(words: AsyncIterator[Text]) -> AsyncIterator[Text]:
    """Waits for the end of the words; says whether its `finally` ran while the engine was locked."""
    try:
        async for word in words:
            pass
        yield word
    finally:
        locked.append(lock.locked() if lock is not None else None)


lock = None


async def joined(words: AsyncIterator[Text]) -> AsyncIterator[Text]:
    async for word in words:
        raise AwayError("Away.", 503)
        yield word


def whole(words: list[Text]) -> Text:
    return Text("+".join(word.text for word in words))


async def both(words: AsyncIterator[Text], all: list[Text]) -> AsyncIterator[Text]:
    async for word in words:
        yield Text(f"{word.text}/{len(all)}")


async def endless(words: AsyncIterator[Text]) -> AsyncIterator[Text]:
    word = await anext(words)
    while True:
        yield word


def short(text: Text) -> Text:
    return text


async def arrivals(words: AsyncIterator[Text | Skipped]) -> AsyncIterator[Text]:
    async for word in words:
        seen_words.append(word)
        yield Text("-") if isinstance(word, Skipped) else word
        if isinstance(word, Skipped):
            go.set()


seen_words = []
'''


@pytest.fixture
def load(tmp_path: Path):
    """Loads a workflow with these nodes and this output; and the functions' module."""
    open_: list[Workflow] = []

    def load(nodes: str, output: str = "last") -> tuple[Workflow, dict[str, Any]]:
        path = workflow(tmp_path, nodes, output)
        with (tmp_path / "workflows" / "flow.py").open("a") as functions:
            functions.write(MORE)
        flow = Workflow.load(path)
        open_.append(flow)
        return flow, flow.graph.nodes["words"].code.kind.function.__globals__  # type: ignore[attr-defined]

    yield load
    for flow in open_:
        flow.close()


class TestAttempts:
    """A function over chunks that is tried again."""

    @pytest.mark.parametrize("text", ["a b c", "wait a b c"])
    def test_a_retry_begins_with_the_first_chunk(self, load, text: str) -> None:
        """The chunks that a failed attempt has taken are there for the next."""
        flow, module = load("words: {function: words}\nlast: {function: flaky, input: words, retry: 2}")
        module["go"].set()

        assert texts(flow([text.encode()])[0]) == text.split()

    def test_a_retry_after_a_time_out_begins_anew(self, load) -> None:
        nodes = "words: {function: words}\nlast: {function: waits, input: words, timeout_s: 0.3, retry: 8}"
        flow, module = load(nodes)
        timer = threading.Timer(0.6, module["go"].set)
        timer.start()

        assert texts(flow([b"wait a b"])[0]) == ["wait a b"]
        assert module["tries"]["waits"] > 1

    def test_a_fallback_over_the_same_chunks_gets_all_of_them(self, load) -> None:
        flow, _ = load(
            "words: {function: words}\n"
            "last: {function: joined, input: words, on_error: {fallback: {function: sentences}}}"
        )

        assert texts(flow([b"a b. c"])[0]) == ["a b.", "c…"]

    def test_the_finally_of_a_timed_out_attempt_runs_without_the_engines_lock(self, load) -> None:
        nodes = "words: {function: words}\nlast: {function: guarded, input: words, timeout_s: 0.2, retry: 3}"
        flow, module = load(nodes)
        module["lock"] = flow.engine._lock
        timer = threading.Timer(0.7, module["go"].set)
        timer.start()

        flow([b"wait a"])

        assert len(module["locked"]) > 1
        assert not any(module["locked"])


class TestWholeToo:
    """A node's chunks, taken as they come, and its whole result."""

    def test_a_fallback_may_take_the_whole_result(self, load) -> None:
        flow, _ = load(
            "words: {function: words}\nlast: {function: joined, input: words, on_error: {fallback: {function: whole}}}"
        )

        assert texts(flow([b"a b c"])[0]) == ["a+b+c"]

    def test_a_condition_may_read_the_whole_result(self, load) -> None:
        nodes = "words: {function: words}\nlast: {function: sentences, input: words, when: len(words) > 2}"
        flow, _ = load(nodes, "{last: last}")

        many, few = flow([b"a b c", b"a b"])

        assert texts(many["last"]) == ["a b c…"]
        assert few["last"].by == "last"

    def test_a_parameter_may_take_the_whole_result(self, load) -> None:
        flow, _ = load("words: {function: words}\nlast: {function: both, inputs: {words: words, all: words}}")

        assert texts(flow([b"a b"])[0]) == ["a/2", "b/2"]


def test_a_skipped_chunk_comes_at_once(load) -> None:
    """The source waits for `go`, which the function sets once it has seen that a chunk before was skipped."""
    flow, module = load(
        """
            words: {function: words}
            short: {function: short, each: words, when: item.text != "wait"}
            last: {function: arrivals, input: short}
        """
    )
    module["go"].clear()

    answer = flow.submit(Text("a wait b")).future.result(15)

    assert texts(answer) == ["a", "-", "b"]


def test_an_endless_function_fails_its_request(load) -> None:
    flow, _ = load("words: {function: words}\nlast: {function: endless, input: words}")

    failed = flow([b"a"])[0]

    assert isinstance(failed, Failure)
    assert (failed.status, failed.node) == (422, "last")
