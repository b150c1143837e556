"""Back-pressure: a node that yields is asked for no more than its client takes, and what the client has is dropped."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.conftest import Write
from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.engine.request import Request
from torchserve_dag.runtime.engine.streaming import MAX_UNTAKEN, MAX_UNTAKEN_BYTES, UNPACED_BYTES
from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.workflow import Workflow

WITHIN_S = 60
CODE = """
import threading
from collections.abc import Iterator

YIELDED: list[str] = []
LEFT: list[str] = []

@dataclass(frozen=True)
class Word:
    text: str

def tell(text: Text) -> Iterator[Word]:
    name, _, count = text.text.partition(" ")
    try:
        for i in range(int(count)):
            YIELDED.append(name)
            yield Word(f"{name}{i}")
    finally:
        LEFT.append(threading.current_thread().name)

def loud(word: Word) -> Word:
    return Word(word.text.upper())

def counted(words: list[Word]) -> int:
    return len(words)

def loud_of(word: Word, count: int) -> Word:
    return Word(f"{word.text.upper()} of {count}")
"""
ALONE = "answer: {function: tell}"
FOLLOWED = "tell: {function: tell}\nmiddle: {function: loud, each: tell}\nanswer: {function: loud, each: middle}"
WHOLE_LIST = """
tell: {function: tell}
count: {function: counted, input: tell}
answer: {function: loud_of, each: tell, inputs: {word: item, count: count}}
"""


class Client:
    """Asks a workflow, and takes the chunks of its answer when it is told to."""

    def __init__(self, workflow: Workflow, ask: str, size: int = 1, options: Options | None = None) -> None:
        """`size` is that of each chunk, in bytes."""
        self.chunks: list[str] = []
        self.taken = 0
        self._size, self._untaken = size, list[Callable[[], None]]()
        self._keep: weakref.WeakSet[Any] = weakref.WeakSet()
        self.request: Request = workflow.engine.submit(ask.encode(), options=options, on_chunk=self._receive)

    def _receive(self, chunk: Any, taken: Callable[[], None]) -> int:
        self.chunks.append(chunk.text)
        self._keep.add(chunk)
        self._untaken.append(taken)
        return self._size

    def take(self, most: int) -> None:
        for _ in range(min(most, len(self._untaken))):
            self._untaken.pop(0)()
            self.taken += 1

    def take_all(self) -> Any:
        until(lambda: self.take(MAX_UNTAKEN) or self.request.future.done())
        return self.request.future.result()

    @property
    def in_memory(self) -> int:
        """How many of its chunks are still in memory."""
        return len(self._keep)


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def at_rest(workflow: Workflow) -> bool:
    """Whether no node runs, and no item is queued."""
    with workflow.engine._lock:
        return not any(station.in_flight or len(station) for station in workflow.engine._stations.values())


def code_of(workflow: Workflow) -> Any:
    """The module of the workflow's functions."""
    kind = next(node.code.kind for node in workflow.graph.nodes.values())
    return sys.modules[kind.function.__module__]


@pytest.mark.parametrize("nodes", [ALONE, FOLLOWED])
class TestClientThatTakesNothing:
    def test_it_is_sent_so_many_chunks_and_then_all_in_order_and_once(self, write: Write, nodes: str) -> None:
        with Workflow.load(write(nodes, CODE)) as workflow:
            client = Client(workflow, "w 200")
            until(lambda: len(client.chunks) == MAX_UNTAKEN)
            until(lambda: at_rest(workflow))
            assert len(code_of(workflow).YIELDED) == len(client.chunks) == MAX_UNTAKEN

            assert client.take_all() == []
            assert [chunk.lower() for chunk in client.chunks] == [f"w{i}" for i in range(200)]

    def test_for_each_that_is_taken_one_more_is_asked_for(self, write: Write, nodes: str) -> None:
        with Workflow.load(write(nodes, CODE)) as workflow:
            client, yielded = Client(workflow, "w 100"), code_of(workflow).YIELDED
            until(lambda: len(client.chunks) == MAX_UNTAKEN)
            until(lambda: at_rest(workflow))
            while client.taken < 100:
                assert len(yielded) == min(100, client.taken + MAX_UNTAKEN)
                client.take(1)
                until(lambda: at_rest(workflow))

            assert client.request.future.result(WITHIN_S) == []
        assert len(client.chunks) == 100

    def test_large_chunks_are_bounded_by_their_bytes(self, write: Write, nodes: str) -> None:
        with Workflow.load(write(nodes, CODE)) as workflow:
            client = Client(workflow, "w 50", size=MAX_UNTAKEN_BYTES // 4)
            until(lambda: len(client.chunks) >= 4 and at_rest(workflow))
            # What was with the nodes that follow before the sizes were known is sent, too.
            assert len(client.chunks) == 4 if nodes == ALONE else len(client.chunks) <= MAX_UNTAKEN
            sent = len(client.chunks)
            client.take(sent - 4)  # as many bytes are still to be taken as may be
            until(lambda: at_rest(workflow))
            assert len(client.chunks) == sent

            assert client.take_all() == []
            assert len(client.chunks) == 50

    def test_many_such_clients_hold_up_nobody(self, write: Write, nodes: str) -> None:
        with Workflow.load(write(nodes, CODE)) as workflow:
            clients = [Client(workflow, "w 9000") for _ in range(200)]
            until(lambda: all(len(client.chunks) == MAX_UNTAKEN for client in clients))
            quick = [Client(workflow, "q 40") for _ in range(10)]
            assert [client.take_all() for client in quick] == [[]] * 10
            assert [len(answer) for answer in workflow([b"l 30"] * 10)] == [30] * 10
            until(lambda: at_rest(workflow))

            assert code_of(workflow).YIELDED.count("w") == 200 * MAX_UNTAKEN
            assert workflow.engine.in_flight == 200
            for client in clients:
                client.request.cancel()

    def test_its_request_ends_at_its_time_limit(self, write: Write, nodes: str) -> None:
        with Workflow.load(write(nodes, CODE)) as workflow:
            client = Client(workflow, "w 9000", options=Options(timeout_s=0.5))

            failure = client.request.future.result(WITHIN_S)
            assert (failure.status, failure.type) == (408, "Timeout")
            until(lambda: code_of(workflow).LEFT)
            client.take(MAX_UNTAKEN)
            until(lambda: at_rest(workflow))
            assert len(client.chunks) == MAX_UNTAKEN, "what is taken afterwards asks for nothing more"

    def test_a_cancelled_stream_is_closed_by_a_lane(self, write: Write, nodes: str) -> None:
        """Its `finally` is the author's code, and whoever cancels may be an event loop."""
        with Workflow.load(write(nodes, CODE)) as workflow:
            for i in range(1, 6):
                client = Client(workflow, "w 9000")
                until(lambda client=client: len(client.chunks) == MAX_UNTAKEN and at_rest(workflow))
                client.request.cancel()

                assert client.request.future.result(WITHIN_S).status == 499
                until(lambda i=i: len(code_of(workflow).LEFT) == i)
        assert all(name.startswith("flow-cpu-") for name in code_of(workflow).LEFT)

    def test_closing_the_engine_ends_it(self, write: Write, nodes: str) -> None:
        with Workflow.load(write(nodes, CODE)) as workflow:
            client = Client(workflow, "w 9000")
            until(lambda: len(client.chunks) == MAX_UNTAKEN and at_rest(workflow))

        assert client.request.future.result(WITHIN_S).status == 503
        assert len(code_of(workflow).LEFT) == 1


@pytest.mark.parametrize("nodes", [ALONE, FOLLOWED])
class TestChunksThatWereSent:
    def test_they_are_not_kept(self, write: Write, nodes: str) -> None:
        with Workflow.load(write(nodes, CODE)) as workflow:
            client = Client(workflow, "w 300")
            until(lambda: len(client.chunks) == MAX_UNTAKEN and at_rest(workflow))
            until(lambda: client.in_memory <= 1)  # the thread that sent the last may have it in its hand
            until(lambda: client.take(1) or len(client.chunks) > 200)

            until(lambda: client.in_memory <= 1)
            client.request.cancel()

    def test_who_does_not_ask_for_chunks_gets_the_list(self, write: Write, nodes: str) -> None:
        with Workflow.load(write(nodes, CODE)) as workflow:
            (answer,) = workflow([b"w 100"])

        assert [word.text.lower() for word in answer] == [f"w{i}" for i in range(100)]


class TestChunksThatCannotBeHeldBack:
    def test_a_node_that_needs_the_whole_list_gets_it_though_nothing_is_taken(self, write: Write) -> None:
        with Workflow.load(write(WHOLE_LIST, CODE)) as workflow:
            client = Client(workflow, "w 100")

            assert client.request.future.result(WITHIN_S) == []
            assert client.chunks == [f"W{i} of 100" for i in range(100)]

    def test_a_client_that_leaves_too_much_of_them_is_cancelled(self, write: Write) -> None:
        with Workflow.load(write(WHOLE_LIST, CODE)) as workflow:
            client = Client(workflow, "w 100", size=UNPACED_BYTES // 4)
            failure = client.request.future.result(WITHIN_S)

            assert (failure.status, failure.type) == (499, "Cancelled")
            assert "more than 16 MB" in failure.message
            until(lambda: at_rest(workflow))
            assert len(client.chunks) <= 100
            assert workflow([b"a 1"])[0][0].text == "A0 of 1"


class TestTaking:
    def test_it_counts_once_for_each_chunk(self, write: Write) -> None:
        with Workflow.load(write(ALONE, CODE)) as workflow:
            again: list[Callable[[], None]] = []

            def receive(_: Any, taken: Callable[[], None]) -> int:
                again.append(taken)
                return MAX_UNTAKEN_BYTES

            request = workflow.engine.submit(b"w 9000", on_chunk=receive)
            until(lambda: len(again) == 1 and at_rest(workflow))
            for _ in range(20):
                again[0]()
                until(lambda: at_rest(workflow))
            assert len(again) == 2
            request.cancel()

    def test_a_chunk_may_be_taken_before_its_receiver_returns(self, write: Write) -> None:
        with Workflow.load(write(ALONE, CODE)) as workflow:
            count = 0

            def receive(_: Any, taken: Callable[[], None]) -> int:
                nonlocal count
                count += 1
                taken()
                return MAX_UNTAKEN_BYTES

            assert workflow.engine.submit(b"w 500", on_chunk=receive).future.result(WITHIN_S) == []
        assert count == 500

    def test_from_other_threads_at_once_no_chunk_is_lost_and_no_stream_stops(self, write: Write) -> None:
        with Workflow.load(write(FOLLOWED, CODE)) as workflow:
            clients = [Client(workflow, "w 300", size=MAX_UNTAKEN_BYTES // 3) for _ in range(8)]
            takers = [threading.Thread(target=client.take_all) for client in clients]
            for taker in takers:
                taker.start()
            for taker in takers:
                taker.join(WITHIN_S)

            assert [client.request.future.result(WITHIN_S) for client in clients] == [[]] * 8
        assert all([chunk.lower() for chunk in one.chunks] == [f"w{i}" for i in range(300)] for one in clients)

    def test_a_python_caller_has_taken_a_chunk_when_its_function_returns(self, write: Write) -> None:
        with Workflow.load(write(ALONE, CODE)) as workflow:
            gate, came = threading.Event(), threading.Event()

            def slow(_: Any) -> None:
                came.set()
                gate.wait(WITHIN_S)

            request = workflow.submit(b"w 300", on_chunk=slow)
            assert came.wait(WITHIN_S)
            assert code_of(workflow).YIELDED == ["w"]
            gate.set()

            assert request.future.result(WITHIN_S) == []
            assert len(code_of(workflow).YIELDED) == 300


def test_a_failure_after_a_pause_comes_after_the_chunks_before_it(write: Write) -> None:
    code = CODE.replace('yield Word(f"{name}{i}")', 'yield Word(f"{name}{i}")\n        raise InputError("No more.")')
    with Workflow.load(write(ALONE, code)) as workflow:
        client = Client(workflow, "w 40")

        assert client.take_all() == Failure(400, "No more.", "InputError", "answer")
        assert len(client.chunks) == 40


def test_a_streaming_handler_is_asked_for_no_more_either(project: Path) -> None:
    (project / "handlers" / "count.py").write_text(HANDLER)
    (project / "handlers" / "count.yaml").write_text(HANDLER_FILE)
    with Workflow.load(project / "handlers" / "count.yaml") as workflow:
        client = Client(workflow, "300")
        until(lambda: len(client.chunks) == MAX_UNTAKEN and at_rest(workflow))

        assert workflow.engine.counts()["count"].items == MAX_UNTAKEN
        assert client.take_all() == []
        assert client.chunks == [str(i) for i in range(300)]


HANDLER = """
from dataclasses import dataclass
from torchserve_dag import Handler, Text

@dataclass(frozen=True)
class Number:
    text: str

class Count(Handler[Text, int, int, Number]):
    def load(self, folder, settings, placement): pass
    def example(self) -> Text: return Text("3")
    def preprocess(self, item: Text) -> int: return int(item.text)
    def stream(self, prepared: int):
        yield from range(prepared)
    def postprocess(self, output: int, item: Text) -> Number: return Number(str(output))
"""
HANDLER_FILE = """
name: count
version: "1.0"
card: {does: Counts., input: A number., output: Numbers., limits: None., weights: []}
"""
