"""A handler with an engine of its own, as a model and as a node, without a server."""

from __future__ import annotations

import json
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from torchserve_dag import ContinuousHandler, EngineLoad, FailedError, Failure, Reply, Text, Usage, Workflow
from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.runtime.engine.queue import TokenQueue
from torchserve_dag.runtime.engine.runner import OwnEngine
from torchserve_dag.runtime.engine.station import Station
from torchserve_dag.runtime.models.continuous import ContinuousModel
from torchserve_dag.runtime.telemetry.series import gauges_of
from torchserve_dag.runtime.worker.protocol import ServiceRequest
from torchserve_dag.runtime.worker.service import WorkflowService

HANDLER = """
import threading
from collections.abc import Callable
from pathlib import Path

from torchserve_dag import ContinuousHandler, InputError, NoSettings, OverloadedError, Placement, Reply, Text, TextChunk
from torchserve_dag import Usage


class Speller(ContinuousHandler[Text, TextChunk]):
    '''Spells a text, one letter a chunk. `wait` waits until it is cancelled; `fail` fails; `late` fails in the middle.'''

    room = 2
    inside: set = set()
    reserved: list = []
    most = 0
    tries = 0

    def load(self, folder: Path, settings: NoSettings, placement: Placement) -> None:
        type(self).inside, type(self).most, type(self).tries, type(self).reserved = set(), 0, 0, []

    def example(self) -> Text:
        return Text("ab")

    def reserve(self, item: Text, client: str | None) -> Callable[[], None]:
        if len(self.reserved) == 24:
            raise OverloadedError("24 are in flight.")
        place = object()
        self.reserved.append(place)
        return lambda: self.reserved.remove(place) if place in self.reserved else None

    def start(self, item: Text, reply: Reply[TextChunk]) -> Callable[[], None]:
        if item.text == "refuse":
            raise InputError("That is refused.", 422)
        gone = threading.Event()
        threading.Thread(target=self.spell, args=(item.text, reply, gone), daemon=True).start()
        return gone.set

    def spell(self, text: str, reply: Reply[TextChunk], gone: threading.Event) -> None:
        kind = type(self)
        kind.inside.add(gone)
        kind.most = max(kind.most, len(kind.inside))
        kind.tries += 1
        try:
            if text == "fail" or (text == "twice" and kind.tries % 2):
                kind.inside.discard(gone)
                reply.fail(OverloadedError("It is busy."))
                return
            if text == "wrong":
                reply.chunk(5)
            for letter in text:
                gone.wait(0.005)
                reply.chunk(TextChunk(letter))
                if text == "wait":
                    gone.wait(30)
            if text == "late":
                reply.fail(ValueError("broken"))
            reply.chunk(TextChunk(finish_reason="stop", usage=Usage.of(3, len(text), 1)))
            kind.inside.discard(gone)
            reply.end()
        finally:
            kind.inside.discard(gone)
"""
CARD = "card: {does: It spells., input: A text., output: Its letters., limits: None., weights: []}"
FUNCTIONS = """
from collections.abc import Iterator

from torchserve_dag import Text, TextChunk


def loud(chunk: TextChunk) -> TextChunk:
    return TextChunk(chunk.text.upper())


def whole(chunks: list[TextChunk]) -> Text:
    return Text("".join(chunk.text for chunk in chunks))


def sorry(text: Text) -> TextChunk:
    return TextChunk(f"no {text.text}")


def one_by_one(text: Text) -> Iterator[TextChunk]:
    yield TextChunk("n")
    yield TextChunk("o")
"""


MANY = """

made = 0


def many(text: Text) -> Iterator[Text]:
    global made
    for made in range(5_000):
        yield Text(str(made))
"""


def project(folder: Path, nodes: str, output: str) -> Path:
    for name in ("handlers", "workflows"):
        (folder / name).mkdir()
    (folder / "handlers" / "speller.py").write_text(HANDLER)
    (folder / "handlers" / "speller.yaml").write_text(f'name: speller\nversion: "1.0"\n{CARD}\n')
    (folder / "workflows" / "spell.py").write_text(FUNCTIONS)
    workflow = folder / "workflows" / "spell.yaml"
    workflow.write_text(
        f'name: spell\nversion: "1.0"\ndoes: It spells.\nnodes:\n{textwrap.indent(nodes, "  ")}\noutput: {output}\n'
    )
    return workflow


@pytest.fixture
def model(tmp_path: Path):
    project(tmp_path, "spell: {handler: speller}", "spell")
    with Workflow.load(tmp_path / "handlers" / "speller.yaml") as model:
        yield model


def speller(workflow: Workflow):
    (loaded,) = [one.starter for one in workflow._loaded.values() if one.own_engine]
    return type(loaded.handler)


def texts(chunks) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_its_chunks_come_one_by_one(model: Workflow) -> None:
    chunks = list(model.stream(Text("abc")))

    assert [chunk.text for chunk in chunks] == ["a", "b", "c", ""]
    assert chunks[-1].usage == Usage.of(3, 3, 1)


def test_no_more_are_inside_than_there_is_room_for(model: Workflow) -> None:
    answers = model([Text("abcd")] * 8)

    assert [texts(answer) for answer in answers] == ["abcd"] * 8
    assert speller(model).most == 2


def test_one_token_leaves_room_for_others(model: Workflow) -> None:
    """Of two places it has one, and in the queue tokens take turns."""
    ours = [model.submit(Text("wait"), options=Options(token="busy"), on_chunk=lambda _: None) for _ in range(20)]  # noqa: S106

    for name in ("other", "third"):
        other = model.submit(Text("ab"), options=Options(token=name), on_chunk=lambda _: None)
        assert other.future.result(20) == []
    assert speller(model).most == 2
    assert len(speller(model).inside) == 1
    for request in ours:
        request.cancel()


@pytest.mark.parametrize(("room", "share"), [(18, 16), (16, 14), (8, 7), (2, 1), (1, 1)])
def test_of_eight_places_one_token_leaves_one(room: int, share: int) -> None:
    own = OwnEngine("engine", "model", room, EngineLoad, lambda _item, _client, done: done(list))
    station: Station = Station("n", batch=room, depth=(), start=lambda _: None, own_engine=own, dropped=[])
    busy, other = (SimpleNamespace(root=SimpleNamespace(options=Options(token=name))) for name in ("busy", "other"))
    station.push([SimpleNamespace(request=busy, obsolete=False)] * 40)

    taken = station.take(room)
    assert len(taken) == share
    station.push([SimpleNamespace(request=other, obsolete=False)] * 40)
    assert [item.request for item in station.take(room - share)] == [other] * (room - share)
    station.leave(taken[0])
    assert len(station.take(1)) == 1


def test_a_fault_of_the_engine_itself_ends_its_request_and_not_who_brings_the_chunk(
    model: Workflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record_chunk(*_: object) -> None:
        raise TypeError("a fault")

    with monkeypatch.context() as patch:
        patch.setattr(model.engine._stations["speller"].counts, "record_chunk", record_chunk)
        failed = model([Text("ab")])[0]

    assert isinstance(failed, Failure)
    assert (failed.status, failed.node) == (500, "speller")
    assert texts(model([Text("ab")])[0]) == "ab"


def test_a_token_that_must_wait_costs_one_look_however_long_its_line_is() -> None:
    looked: list[int] = []
    only_other = [True]

    def fits(item: SimpleNamespace) -> bool:
        looked.append(item.number)
        return item.request.root is other or not only_other

    queue: TokenQueue = TokenQueue(dropped := [], fits)
    busy, other = (SimpleNamespace(options=Options(token=name)) for name in ("busy", "other"))
    lines = [SimpleNamespace(request=SimpleNamespace(root=busy), obsolete=n < 500, number=n) for n in range(1_000)]
    lines.append(SimpleNamespace(request=SimpleNamespace(root=other), obsolete=False, number=1_000))
    for item in lines:
        queue.push(item)

    assert [item.number for item in queue.take(10)] == [1_000]
    assert (looked, len(dropped), len(queue)) == ([500, 1_000], 500, 500)
    only_other.clear()
    assert queue.peek().number == 500
    assert [item.number for item in queue.take(3)] == [500, 501, 502]
    lines[503].obsolete = lines[999].obsolete = True
    queue.drop_obsolete()
    assert len(queue) == 495


def test_a_generator_is_never_far_ahead_of_a_loop(tmp_path: Path) -> None:
    """Who reads slowly keeps few chunks in memory, and no thread waiting."""
    path = project(tmp_path, "many: {function: many}", "many")
    (tmp_path / "workflows" / "spell.py").write_text(FUNCTIONS + MANY)

    with Workflow.load(path) as workflow:
        stream = workflow.stream(Text("a"))
        next(stream)
        time.sleep(0.3)
        assert 1 < workflow.graph.nodes["many"].code.kind.function.__globals__["made"] < 40  # type: ignore[attr-defined]
        stream.close()


def test_who_leaves_the_loop_frees_its_place(model: Workflow) -> None:
    for _ in range(5):
        for chunk in model.stream(Text("wait")):
            assert chunk.text == "w"
            break

    assert texts(model([Text("ab")])[0]) == "ab"
    deadline = time.monotonic() + 10
    while speller(model).inside and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not speller(model).inside


@pytest.mark.parametrize(
    ("text", "status", "kind"),
    [
        ("refuse", 422, "InputError"),
        ("fail", 503, "Overloaded"),
        ("wrong", 500, "WrongType"),
        ("late", 500, "HandlerError"),
    ],
)
def test_a_failure_is_the_items_own(model: Workflow, text: str, status: int, kind: str) -> None:
    """Of whatever kind, and whenever it comes; a stream raises it."""
    good, bad = model([Text("ab"), Text(text)])

    assert texts(good) == "ab"
    assert isinstance(bad, Failure)
    assert (bad.status, bad.type, bad.node) == (status, kind, "speller")
    with pytest.raises(FailedError) as raised:
        list(model.stream(Text(text)))
    assert raised.value.failure.status == status


def test_its_tokens_are_counted(model: Workflow) -> None:
    model([Text("abcd"), Text("ab")])

    counts = model.counts()["speller"]
    language = counts.language["text_completion"]
    assert (counts.items, counts.usage) == (2, Usage.of(6, 6, 2))
    assert (language.prompt_tokens.sum, language.answer_tokens.sum, language.cached_tokens) == (6, 6, 2)
    assert (language.first_token_s.count, language.token_s.count, language.answer_s.count) == (2, 2, 2)
    assert counts.language["chat"].first_token_s.count == 0


def test_whom_there_is_no_room_for_waits(model: Workflow) -> None:
    """Two are inside; the engine does not know of the third, which gateways and autoscalers have to see."""

    def waiting() -> float:
        gauges = gauges_of(model.own_engines, model.engine.queued())
        return {name: value for (_, name, _), value in gauges.items()}["torchserve_dag_node_waiting"]

    requests = [model.submit(Text("wait")) for _ in range(3)]
    deadline = time.monotonic() + 20
    while waiting() != 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for request in requests:
        request.cancel()


def test_what_is_too_much_is_refused_before_it_waits(model: Workflow) -> None:
    """Two are inside, 22 wait, and one more is told so at once. What they had reserved is free after them."""
    requests = [model.submit(Text("wait")) for _ in range(24)]

    refused = model.submit(Text("ab")).future.result(10)

    assert isinstance(refused, Failure)
    assert (refused.status, refused.message) == (503, "24 are in flight.")
    for request in requests:
        request.cancel()
    assert [texts(answer) for answer in model([Text("ab"), Text("cd")])] == ["ab", "cd"]
    assert isinstance(model([Text("fail")])[0], Failure)
    assert speller(model).reserved == []


def test_an_answer_that_fails_has_no_duration(model: Workflow) -> None:
    """Its first token came, and is counted."""
    model([Text("late"), Text("fail")])

    language = model.counts()["speller"].language["text_completion"]
    assert (language.first_token_s.count, language.answer_s.count) == (1, 0)


def test_followers_run_while_it_goes_on(tmp_path: Path) -> None:
    path = project(tmp_path, "spell: {handler: speller}\nloud: {function: loud, each: spell}", "loud")

    with Workflow.load(path) as workflow:
        stream = workflow.stream(Text("wait"))
        assert next(stream).text == "W"  # and it waits for 30 seconds now
        stream.close()


def test_its_text_can_be_gathered(tmp_path: Path) -> None:
    path = project(tmp_path, "spell: {handler: speller}\nwhole: {function: whole, input: spell}", "whole")

    with Workflow.load(path) as workflow:
        assert workflow([Text("abc")]) == [Text("abc")]
        request = workflow.submit(Text("abcd"))
        request.future.result()
        assert request.usage == Usage.of(3, 4, 1)


@pytest.mark.parametrize(("function", "answer"), [("sorry", "no fail"), ("one_by_one", "no")])
def test_before_its_first_chunk_a_fallback_stands_in(tmp_path: Path, function: str, answer: str) -> None:
    """One that answers at once, and one that streams."""
    node = f"spell: {{handler: speller, on_error: {{fallback: {{function: {function}}}}}}}"

    with Workflow.load(project(tmp_path, node, "spell")) as workflow:
        assert texts(workflow.stream(Text("fail"))) == answer
        assert texts(workflow.stream(Text("ab"))) == "ab"
        with pytest.raises(FailedError):
            list(workflow.stream(Text("late")))


def test_before_its_first_chunk_it_is_retried(tmp_path: Path) -> None:
    with Workflow.load(project(tmp_path, "spell: {handler: speller, retry: 1}", "spell")) as workflow:
        speller(workflow).tries = 0
        assert texts(workflow.stream(Text("twice"))) == "twice"
        with pytest.raises(FailedError):
            list(workflow.stream(Text("fail")))


def test_a_time_limit_of_its_node_ends_it(tmp_path: Path) -> None:
    with Workflow.load(project(tmp_path, "spell: {handler: speller, timeout_s: 0.3}", "spell")) as workflow:
        answer = workflow([Text("wait")])[0]

    assert (answer.status, answer.type) == (504, "Timeout")


def test_nothing_but_a_fallback_stands_in_for_a_stream(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="a fallback may stand in for it before its first chunk"):
        Workflow.load(project(tmp_path, "spell: {handler: speller, on_error: skip}", "spell"))


def test_a_stream_has_an_idle_limit_and_no_total_one(tmp_path: Path) -> None:
    """Each chunk moves the deadline; a limit that the client chose is for the whole answer."""
    path = project(tmp_path, "spell: {handler: speller}", "spell")
    path.write_text(path.read_text() + "serve: {timeout_s: 1}\n")

    with Workflow.load(path) as workflow:
        slow = "a" * 300  # 5 ms each
        assert texts(workflow.stream(Text(slow))) == slow
        limited = workflow.submit(Text(slow), options=Options(timeout_s=0.5), on_chunk=lambda _: None)
        assert limited.future.result().status == 408
        idle = workflow.submit(Text("wait"), on_chunk=lambda _: None)
        assert idle.future.result().status == 504


@pytest.mark.parametrize(("nodes", "output"), [("spell: {handler: speller}", "spell"),
                                               ("spell: {handler: speller}\nwhole: {function: whole, input: spell}", "whole")])  # fmt: skip
def test_a_client_is_told_the_usage_if_it_asks(tmp_path: Path, nodes: str, output: str) -> None:
    """In a stream as the last line, of a whole answer in a header."""
    project(tmp_path, nodes, output)
    from torchserve_dag.runtime.graph.read import read_graph
    from torchserve_dag.runtime.project.folders import Project

    served = Project(tmp_path)
    service = WorkflowService(served, read_graph(served, tmp_path / "workflows" / "spell.yaml"), {}, None)
    lines: list[bytes] = []
    lock = threading.Lock()

    def on_chunk(body: bytes, content_type: str, taken) -> None:
        with lock:
            lines.append(body)
        taken()

    request = ServiceRequest("1", b"abc", "text/plain", options={"x-usage": "true"})
    response = service.submit(request, on_chunk).result(10)
    service.close()

    usage = {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    if output == "spell":
        assert json.loads(lines[0]) == {"text": "a", "index": 0}
        assert json.loads(response.body) == {"usage": usage}
    else:
        assert json.loads(response.body) == {"text": "abc"}
        assert json.loads(response.headers["x-usage"]) == usage


class SlowToStart(ContinuousHandler[str, str]):
    """Starts an item once `go` is set."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.started: list[str] = []
        self.cancelled: list[str] = []

    def start(self, item: str, reply: Reply[str]) -> Callable[[], None]:
        self.started.append(item)
        self.begun.set()
        self.go.wait(30)
        return lambda: self.cancelled.append(item)


def test_to_cancel_is_to_wait_for_no_start() -> None:
    """What is being started is cancelled once it has been; what waits to be started never is."""
    handler = SlowToStart()
    model = ContinuousModel("slow", handler, "cpu")
    answers: list[Failure] = []
    cancels = [model(item, Options(), answers.append) for item in "abc"]
    assert handler.begun.wait(30)
    for cancel in cancels:
        cancel()
    before = [answer.status for answer in answers]
    handler.go.set()
    model._starting.shutdown(wait=True)

    assert before == [499, 499, 499]
    assert handler.started == handler.cancelled == ["a"]
