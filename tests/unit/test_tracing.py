"""Spans of requests: made with OpenTelemetry's SDK, and sent over its own protocol to a server that reads them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.unit.conftest import CARD, IMPORTS
from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.engine.span import Span
from torchserve_dag.runtime.engine.span_attributes import MAX_ATTRIBUTES, MAX_CHARACTERS, MAX_ELEMENTS, attributes_of
from torchserve_dag.runtime.messages import Chat, Failure, Text
from torchserve_dag.runtime.telemetry import tracing
from torchserve_dag.runtime.workflow import Workflow

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
SECOND = 1_000_000_000
START = 1_790_000_000 * SECOND


def request_spans(trace: str | None = None, failure: Failure | None = None) -> list[Span]:
    """A request of three seconds, with a node that ran in the second of them."""
    return [
        Span("flow", "id-1", trace, START, START + 3 * SECOND, {}, failure),
        Span(
            "detect", "id-1", trace, START + SECOND, START + 2 * SECOND,
            {"batch": 4, "queue_s": 0.25, "tries": 1}, failure,
        ),
    ]  # fmt: skip


def made(*requests: list[Span]) -> list[ReadableSpan]:
    """The SDK's spans of some requests, as they ended: nodes before their request."""
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    observe = tracing.span_maker(provider)
    for spans in requests:
        observe(spans)
    return list(kept.get_finished_spans())


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (tracing.EXPORTERS, "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_SERVICE_NAME", "OTEL_TRACES_SAMPLER"):
        monkeypatch.delenv(name, raising=False)
    tracing.observer.cache_clear()
    yield
    tracing.observer.cache_clear()


def test_a_node_is_a_child_of_its_request_and_the_request_of_the_client() -> None:
    node, request = made(request_spans(TRACEPARENT))

    assert (request.name, request.kind) == ("flow", SpanKind.SERVER)
    assert request.parent is not None
    assert request.parent.is_remote
    assert f"{request.parent.span_id:016x}" == PARENT_ID
    assert (node.name, node.kind) == ("detect", SpanKind.INTERNAL)
    assert node.parent is not None
    assert node.parent.span_id == request.context.span_id
    assert {f"{span.context.trace_id:032x}" for span in (node, request)} == {TRACE_ID}


def test_times_and_attributes_are_those_of_the_engine() -> None:
    node, request = made(request_spans())

    assert (request.start_time, request.end_time) == (START, START + 3 * SECOND)
    assert (node.start_time, node.end_time) == (START + SECOND, START + 2 * SECOND)
    assert node.attributes == {"torchserve_dag.batch": 4, "torchserve_dag.queue_s": 0.25, "torchserve_dag.tries": 1}
    assert request.attributes == {"torchserve_dag.request_id": "id-1"}
    assert node.status.status_code is request.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    "malformed", ["", "nonsense", TRACEPARENT.upper(), f"00-{'0' * 32}-{PARENT_ID}-01", f"ff-{TRACE_ID}-{PARENT_ID}-01"]
)
def test_a_malformed_traceparent_is_ignored(malformed: str) -> None:
    node, request = made(request_spans(malformed))

    assert request.parent is None
    assert node.context.trace_id == request.context.trace_id != 0


def test_requests_without_a_client_are_traces_of_their_own() -> None:
    first, second = made(request_spans()[:1], request_spans()[:1])

    assert first.context.trace_id != second.context.trace_id


def test_a_client_that_does_not_sample_gets_no_spans() -> None:
    assert made(request_spans(TRACEPARENT.removesuffix("1") + "0")) == []


@pytest.mark.parametrize(("status", "expected"), [(500, StatusCode.ERROR), (422, StatusCode.UNSET)])
def test_a_failure_is_an_error_where_it_is_not_the_clients(status: int, expected: StatusCode) -> None:
    node, _ = made(request_spans(failure=Failure(status, "It did not work.", "SomeError", "detect")))

    assert node.status.status_code is expected
    assert node.status.description == (None if expected is StatusCode.UNSET else "It did not work.")
    assert node.attributes is not None
    assert node.attributes["error.type"] == "SomeError"
    assert node.attributes["torchserve_dag.status"] == status
    assert node.attributes["torchserve_dag.message"] == "It did not work."


class Collector(HTTPServer):
    """Reads what an exporter sends, as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receive)
        self.received: list[Any] = []
        self.came = threading.Event()
        self.answering = threading.Event()
        self.answering.set()

    def spans(self) -> dict[str, Any]:
        """By their names, of all that came."""
        resources = [one for message in self.received for one in message.resource_spans]
        return {span.name: span for one in resources for scope in one.scope_spans for span in scope.spans}


class _Receive(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.came.set()
        self.server.answering.wait(20)
        assert self.path == "/v1/traces"
        self.server.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    yield server
    server.answering.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def provider(collector: Collector) -> Iterator[TracerProvider]:
    provider = tracing._provider(["otlp"])
    yield provider
    collector.answering.set()
    provider.shutdown()


def test_an_otlp_server_gets_the_spans(collector: Collector, provider: TracerProvider) -> None:
    tracing.span_maker(provider)(request_spans(TRACEPARENT))
    assert provider.force_flush()

    resource = collector.received[0].resource_spans[0]
    spans = collector.spans()
    named = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert named["service.name"] == "torchserve-dag"
    assert spans["flow"].trace_id.hex() == spans["detect"].trace_id.hex() == TRACE_ID
    assert spans["flow"].parent_span_id.hex() == PARENT_ID
    assert spans["detect"].parent_span_id == spans["flow"].span_id
    assert spans["detect"].end_time_unix_nano - spans["detect"].start_time_unix_nano == SECOND


def test_a_workflow_tells_of_its_requests_without_being_told_to(
    write: Callable[..., Path], collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("answer: {handler: upper}")
    monkeypatch.setenv(tracing.EXPORTERS, "otlp")
    with Workflow.load(path) as workflow:
        workflow.submit(b"a", options=Options(trace=TRACEPARENT)).future.result(20)
        deadline = time.monotonic() + 60
        while "flow" not in collector.spans():
            assert time.monotonic() < deadline, "the request's span did not come within 60 s"
            time.sleep(0.01)

    spans = collector.spans()
    assert spans.keys() == {"flow", "request", "answer"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE_ID}
    assert spans["flow"].parent_span_id.hex() == PARENT_ID
    assert spans["request"].parent_span_id == spans["answer"].parent_span_id == spans["flow"].span_id
    assert (
        spans["flow"].start_time_unix_nano
        <= spans["request"].end_time_unix_nano
        <= spans["answer"].end_time_unix_nano
        <= spans["flow"].end_time_unix_nano
    )


def test_a_server_that_does_not_answer_blocks_nobody(collector: Collector, provider: TracerProvider) -> None:
    collector.answering.clear()
    observe = tracing.span_maker(provider)
    observe(request_spans())
    assert collector.came.wait(10)

    for _ in range(3000):  # more than the queue holds, while the exporter waits
        observe(request_spans())

    assert collector.received == []


def test_a_process_has_one_observer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracing.EXPORTERS, "console")

    assert tracing.observer() is tracing.observer() is not None


@pytest.mark.parametrize("value", [None, "", "none", " none , "])
def test_spans_are_off_unless_they_are_asked_for(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv(tracing.EXPORTERS, value)

    assert tracing.observer() is None


@pytest.mark.parametrize(
    ("exporters", "protocol", "why"),
    [
        ("nobody", "", 'no installed package has the exporter "nobody"'),
        ("otlp", "pigeon", '"pigeon" is not an OTLP protocol; known: http/protobuf, grpc'),
    ],
)
def test_what_cannot_be_had_is_said_once(
    exporters: str, protocol: str, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(tracing.EXPORTERS, exporters)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)

    assert tracing.observer() is tracing.observer() is None
    assert caplog.messages == [f"OTEL_TRACES_EXPORTER is {exporters}, but no spans are exported: {why}"]


def test_where_opentelemetry_is_missing_a_worker_says_so_and_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(tracing.EXPORTERS, "otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)  # which makes its import fail

    assert tracing.observer() is None
    (message,) = caplog.messages
    assert message.endswith("opentelemetry.sdk.resources is missing (pip install 'torchserve-dag[tracing]')")


SPEAKER = """
class Speaker(ContinuousHandler[Chat | Prompt, TextChunk]):
    def load(self, folder, settings, placement): pass
    def example(self) -> Chat: return Chat.of("Hello")
    def start(self, item: Chat | Prompt, reply: Reply[TextChunk]):
        reply.chunk(TextChunk("secret answer"))
        reply.chunk(TextChunk(finish_reason="stop", usage=Usage.of(7, 2, 4), served_by="spoken one"))
        reply.end()
        return lambda: None
    def load_now(self) -> EngineLoad: return EngineLoad(engine="spoken")
"""


def write_speaker(project: Path) -> None:
    names = "Chat, ContinuousHandler, EngineLoad, Prompt, Reply, TextChunk, Usage"
    (project / "handlers" / "speaker.py").write_text(f"from torchserve_dag import {names}\n{SPEAKER}")
    card = "card: {does: It speaks., input: A chat., output: Text., limits: None., weights: []}"
    (project / "handlers" / "speaker.yaml").write_text(f'name: speaker\nversion: "1.0"\n{card}\n')


def test_the_span_of_a_language_model_has_numbers_and_no_text(tmp_path: Path) -> None:
    (tmp_path / "handlers").mkdir()
    write_speaker(tmp_path)
    kept: list[Span] = []
    with Workflow.load(tmp_path / "handlers" / "speaker.yaml") as model:
        model.engine._observer = kept.extend
        model([Chat.of("secret question", adapter="pirate")])

    (span,) = [span for span in made(kept) if span.name == "speaker" and span.kind is SpanKind.INTERNAL]
    assert span.attributes is not None
    assert span.attributes["torchserve_dag.served_by"] == "spoken one"
    found = {name: value for name, value in span.attributes.items() if name.startswith("gen_ai.")}
    assert found.pop("gen_ai.response.time_to_first_chunk") >= 0
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "spoken",
        "gen_ai.request.model": "speaker:pirate",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 4,
    }
    assert "secret" not in str(kept)


VERDICTS = """
from collections.abc import Iterator, Mapping

@dataclass(frozen=True)
class Verdict:
    category: str
    text: str
    scores: list[float]

    def span_attributes(self) -> Mapping[str, object]:
        if self.text == "secret trouble": raise RuntimeError("no")
        return {"verdict": self.category, "scores": self.scores, "gen_ai.data_source.id": "docs/3"}

@dataclass(frozen=True)
class Piece:
    number: int

    def span_attributes(self) -> Mapping[str, object]:
        return {"number": self.number}

def judge(text: Text) -> Verdict:
    return Verdict("insult", text.text, [0.75, 0.5])

def pieces(text: Text) -> Iterator[Piece]:
    yield Piece(1)
    yield Piece(2)
"""


def spans_of(path: Path, message: object) -> list[Span]:
    """The engine's spans of a request, that of the whole request first."""
    kept: list[Span] = []
    with Workflow.load(path) as workflow:
        workflow.engine._observer = kept.extend
        workflow([message])
    return kept


def test_a_message_says_what_of_it_is_on_the_span_and_nothing_else_is(write: Callable[..., Path]) -> None:
    spans = spans_of(write("answer: {function: judge}", VERDICTS), Text("secret insult"))

    (span,) = [span for span in made(spans) if span.name == "answer"]
    assert span.attributes is not None
    assert span.attributes["torchserve_dag.verdict"] == "insult"
    assert span.attributes["torchserve_dag.scores"] == (0.75, 0.5)
    assert span.attributes["gen_ai.data_source.id"] == "docs/3"
    assert span.attributes["torchserve_dag.batch"] == 1
    assert "secret" not in str(spans)


def test_each_chunk_says_it_and_the_end_repeats_the_last(write: Callable[..., Path]) -> None:
    spans = spans_of(write("answer: {function: pieces}", VERDICTS), Text("any"))

    assert [span.attributes["number"] for span in spans if span.name == "answer"] == [1, 2, 2]


def test_a_message_that_raises_says_nothing_and_fails_nothing(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[Span] = []
    with Workflow.load(write("answer: {function: judge}", VERDICTS)) as workflow:
        workflow.engine._observer = kept.extend
        (answer,) = workflow([Text("secret trouble")])

    assert answer.category == "insult"
    assert "verdict" not in kept[-1].attributes
    assert "Verdict.span_attributes raised" in caplog.text


class Talkative:
    """A message that says more than a span holds."""

    def __init__(self, **said: object) -> None:
        self.said = said

    def span_attributes(self) -> dict[str, object]:
        return self.said


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"text": "a" * 1_000}, {"text": "a" * MAX_CHARACTERS}),
        ({"numbers": list(range(1_000))}, {"numbers": tuple(range(MAX_ELEMENTS))}),
        ({"mixed": [1, "a", None]}, {"mixed": ("1", "a")}),
        ({"nothing": None, "image": object(), "map": {"a": 1}, "right": True}, {"right": True}),
        ({"a" * 1_000: 1, "one": np.float32(0.5)}, {"one": 0.5}),
        ({f"n{i}": i for i in range(100)}, {f"n{i}": i for i in range(MAX_ATTRIBUTES)}),
    ],
)
def test_what_a_message_says_has_limits(said: dict[str, object], expected: dict[str, object]) -> None:
    assert attributes_of(Talkative(**said)) == expected


def speaking(write: Callable[..., Path], project: Path, nodes: str, functions: str = "") -> Path:
    """A workflow with a language model."""
    write_speaker(project)
    return write(nodes, f"from torchserve_dag import TextChunk\n{functions}")


def test_a_workflow_of_language_models_says_what_it_took_and_who_answered(
    write: Callable[..., Path], project: Path
) -> None:
    functions = "def both(first: list[TextChunk], second: list[TextChunk]) -> Text: return Text(first[0].text)"
    path = speaking(
        write,
        project,
        """
        first: {handler: speaker}
        second: {handler: speaker}
        answer: {function: both, inputs: {first: first, second: second}}
        """,
        functions,
    )
    spans = spans_of(path, Chat.of("secret question"))

    (span,) = [span for span in made(spans) if span.kind is SpanKind.SERVER]
    assert span.attributes == {
        "torchserve_dag.request_id": spans[0].request_id,
        "torchserve_dag.version": "1.0",
        "torchserve_dag.served_by": ("spoken one",),
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.agent.name": "flow",
        "gen_ai.usage.input_tokens": 14,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 8,
    }
    assert "secret" not in str(spans)


def test_of_an_answer_in_chunks_the_time_to_the_first_is_there(write: Callable[..., Path], project: Path) -> None:
    kept: list[Span] = []
    with Workflow.load(speaking(write, project, "answer: {handler: speaker}")) as workflow:
        workflow.engine._observer = kept.extend
        assert len(list(workflow.stream(Chat.of("Hello")))) == 2

    whole = kept[0]
    first_s = whole.attributes["gen_ai.response.time_to_first_chunk"]
    assert isinstance(first_s, float)
    assert 0 <= first_s <= (whole.end_ns - whole.start_ns) / SECOND + 0.01


def test_a_workflow_without_language_models_has_no_attributes_of_them(write: Callable[..., Path]) -> None:
    spans = spans_of(write("answer: {handler: upper}"), Text("a"))

    assert spans[0].attributes == {"version": "1.0"}


TALKER = """
from torchserve_dag import ContinuousHandler, EngineLoad, Reply

@dataclass(frozen=True)
class Piece:
    number: int

    def span_attributes(self) -> dict[str, object]:
        return {"number": self.number}

class Talker(ContinuousHandler[Text, Piece]):
    def load(self, folder, settings, placement): pass
    def example(self) -> Text: return Text("Hello")
    def start(self, item: Text, reply: Reply[Piece]):
        for number in range(3):
            reply.chunk(Piece(number))
        reply.end()
        return lambda: None
    def load_now(self) -> EngineLoad: return EngineLoad()
"""


def test_chunks_that_come_by_themselves_have_one_span_with_what_the_last_says(
    write: Callable[..., Path], project: Path
) -> None:
    (project / "handlers" / "talker.py").write_text(IMPORTS + TALKER)
    (project / "handlers" / "talker.yaml").write_text(f'name: talker\nversion: "1.0"\n{CARD}')
    kept: list[Span] = []
    with Workflow.load(write("answer: {handler: talker}")) as workflow:
        workflow.engine._observer = kept.extend
        assert [chunk.number for chunk in workflow.stream(Text("Hello"))] == [0, 1, 2]

    assert [span.attributes["number"] for span in kept if span.name == "answer"] == [2]
