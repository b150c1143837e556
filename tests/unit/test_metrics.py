"""What a worker prints for TorchServe to count, read as TorchServe reads it."""

from __future__ import annotations

import json
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchserve_dag.direct.serving import metrics_of
from torchserve_dag.front_door.door import Door
from torchserve_dag.runtime.engine.counts import OPERATIONS, LanguageCounts, NodeCounts, WorkflowCounts, Written
from torchserve_dag.runtime.engine.runner import OwnEngine
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.handler import EngineLoad
from torchserve_dag.runtime.messages import Chat, Prompt, Text, TextChunk, Usage
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.telemetry.conversations import KeptCounts
from torchserve_dag.runtime.telemetry.metrics import Publisher, publish_every
from torchserve_dag.runtime.telemetry.series import (
    GAUGES,
    MODEL,
    OPERATION,
    PREFIX,
    PROVIDER,
    Series,
    gauges_of,
    series_of,
    workflow_series,
)
from torchserve_dag.runtime.worker.protocol import Service
from torchserve_dag.runtime.workflow import Workflow
from torchserve_dag.server.prometheus import samples
from torchserve_dag.server.state import State
from torchserve_dag.stack.metrics_page import MetricsPage

METRIC = re.compile(
    r"^(?:INFO > )?\[METRICS]"  # WorkerLifeCycle.java, then Metric.java, both of 0.12.0
    r"\s*([\w\s]+)\.([\w\s]+):([0-9\-,.e]+)\|#([^|]*)(\|#type:([^|,]+))?\|#hostname:([^,]+),([^,]+)(,(.*))?$"
)
Key = tuple[str, ...]


class TorchServe:
    """Adds up, as its Java does: labels by their place in the first line of a metric."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self.totals: Counter[tuple[str, Key]] = Counter()

    def read(self, line: str) -> None:
        found = METRIC.match(line)
        assert found, line
        pairs = [pair.split(":") for pair in found[4].split(",")]
        assert all(len(pair) == 2 for pair in pairs), line
        assert found[6] in {"COUNTER", "GAUGE"}
        names, values = [name for name, _ in pairs], tuple(value for _, value in pairs)
        assert self.names.setdefault(found[1], names) == names
        assert float(found[3]) >= 0
        self.totals[found[1], values] = float(found[3]) + (
            self.totals[found[1], values] if found[6] == "COUNTER" else 0
        )

    def value(self, metric: str, *labels: str) -> float:
        name = metric if metric.startswith("gen_ai_") else PREFIX + metric
        assert (name, labels) in self.totals, metric
        return self.totals[name, labels]


def told(publisher: Publisher, server: TorchServe | None = None) -> TorchServe:
    server = server or TorchServe()
    for line in publisher.lines():
        server.read(line)
    return server


def test_a_histogram_has_the_series_that_prometheus_gives_one() -> None:
    counts = NodeCounts()
    counts.record_batch([0.003, 0.003, 20.0, 60.0], 0.7, 1)

    server = told(Publisher("flow", "1.0", lambda: series_of({"detect": counts}, {}), print))

    where = ("flow", "1.0", "detect")
    assert server.names[PREFIX + "queue_seconds_bucket"] == ["workflow", "version", "node", "le"]
    assert server.value("queue_seconds_bucket", *where, "0.0025") == 0
    assert server.value("queue_seconds_bucket", *where, "0.005") == 2
    assert server.value("queue_seconds_bucket", *where, "10.0") == 2
    assert server.value("queue_seconds_bucket", *where, "30.0") == 3
    assert server.value("queue_seconds_bucket", *where, "+Inf") == 4
    assert server.value("queue_seconds_count", *where) == 4
    assert server.value("queue_seconds_sum", *where) == pytest.approx(80.006)
    assert server.value("run_seconds_bucket", *where, "1.0") == server.value("run_seconds_count", *where) == 1
    assert server.value("batch_size_bucket", *where, "4.0") == 1
    assert server.value("batch_size_bucket", *where, "2.0") == 0
    assert server.value("batch_size_sum", *where) == server.value("items_total", *where) == 4
    assert server.value("failures_total", *where) == 1


def test_a_series_is_there_before_anything_has_happened() -> None:
    server = told(Publisher("flow", "1.0", lambda: series_of({"detect": NodeCounts()}, {}), print))

    assert set(server.totals.values()) == {0}
    assert server.value("failures_total", "flow", "1.0", "detect") == 0
    assert server.value("run_seconds_bucket", "flow", "1.0", "detect", "+Inf") == 0


def test_nothing_is_written_where_nothing_changed() -> None:
    counts, written = NodeCounts(), list[str]()
    publisher = Publisher("flow", "1.0", lambda: series_of({"detect": counts}, {}), written.append)
    publisher.publish()
    publisher.publish()
    assert written[1:] == [""]

    counts.skipped += 2
    publisher.publish()
    assert re.sub(r"hostname:.*\n", "", written[-1]) == (
        f"[METRICS]{PREFIX}skipped_total.Count:2|#workflow:flow,version:1.0,node:detect|#type:COUNTER|#"
    )


@given(st.lists(st.tuples(st.lists(st.floats(0, 100), min_size=1, max_size=9), st.floats(0, 100), st.booleans())))
def test_what_is_published_step_by_step_adds_up_to_what_was_counted(
    batches: list[tuple[list[float], float, bool]],
) -> None:
    counts, server = NodeCounts(), TorchServe()
    publisher = Publisher("flow", "1.0", lambda: series_of({"a": counts}, {}), print)
    for waits, run_s, published in batches:
        counts.record_batch(waits, run_s, 0)
        if published:
            told(publisher, server)
    told(publisher, server)

    at_once = told(Publisher("flow", "1.0", lambda: series_of({"a": counts}, {}), print))
    assert server.totals.keys() == at_once.totals.keys()
    assert list(server.totals.values()) == pytest.approx([at_once.totals[key] for key in server.totals])


def test_two_workers_add_up_and_a_worker_that_is_started_anew_takes_nothing_away() -> None:
    counts, server = NodeCounts(), TorchServe()
    counts.record_batch([0.1], 0.1, 0)
    for _ in range(3):
        told(Publisher("flow", "1.0", lambda: series_of({"a": counts}, {}), print), server)

    assert server.value("items_total", "flow", "1.0", "a") == 3


def test_a_name_cannot_break_a_line() -> None:
    server = told(Publisher("a|b", "1.0", lambda: series_of({"c:d,e": NodeCounts()}, {}), print))

    assert server.value("items_total", "a_b", "1.0", "c_d_e") == 0


def test_the_thread_publishes_and_the_last_counts_are_published_when_it_is_closed() -> None:
    counts, looked, written = NodeCounts(), threading.Semaphore(0), list[str]()

    def count() -> Mapping[Series, float]:
        looked.release()
        return series_of({"a": counts}, {})

    publisher = publish_every(0.01, "flow", "1.0", count, written.append)
    for _ in range(3):
        assert looked.acquire(timeout=60)
    counts.record_batch([0.1, 0.1], 0.1, 0)
    publisher.close()

    server = TorchServe()
    for line in "".join(written).splitlines():
        server.read(line)
    assert server.value("items_total", "flow", "1.0", "a") == 2


def test_metrics_that_cannot_be_written_are_written_later(caplog: pytest.LogCaptureFixture) -> None:
    counts, written, server = NodeCounts(), queue.Queue[str](), TorchServe()
    counts.record_batch([0.1, 0.1], 0.1, 0)
    failures = iter([OSError("no process can be started")] * 3)

    def write(lines: str) -> None:
        if failure := next(failures, None):
            raise failure
        written.put(lines)

    publisher = publish_every(0.01, "flow", "1.0", lambda: series_of({"a": counts}, {}), write)
    for line in written.get(timeout=60).splitlines():
        server.read(line)
    publisher.close()

    assert server.value("items_total", "flow", "1.0", "a") == 2
    assert sum(record.exc_info is not None for record in caplog.records) == 1


def test_counts_that_cannot_be_had_end_the_thread_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Mapping[Series, float]:
        raise RuntimeError("no counts")

    Publisher("flow", "1.0", broken, print).run(0)

    assert [record.message for record in caplog.records] == ["the metrics of this worker are no longer updated"]


class Answer:
    """An item of a language model."""

    def __init__(self, value: Chat | Prompt, waited_s: float = 0.0) -> None:
        self.value, self.since = value, time.monotonic() - waited_s
        self.written: Written | None = None


def language_counts() -> NodeCounts:
    """Those of a node with an engine of its own, before anything was asked."""
    return NodeCounts(language={name: LanguageCounts() for name in OPERATIONS})


def own_engine(load: EngineLoad) -> OwnEngine:
    return OwnEngine("openvino", "smol", 16, lambda: load, lambda _item, _client, done: done(list))


CHAT = ("flow", "1.0", "write", "chat", "openvino", "smol")


def test_a_language_model_has_the_metrics_of_opentelemetrys_conventions() -> None:
    counts, item = language_counts(), Answer(Chat.of("Hello"), waited_s=0.3)
    counts.record_chunk(item, TextChunk("It"))
    counts.record_chunk(item, TextChunk(" is", finish_reason="stop", usage=Usage.of(300, 2, 256)))
    counts.record_end(item)

    own = {"write": own_engine(EngineLoad())}
    server = told(Publisher("flow", "1.0", lambda: series_of({"write": counts}, own), print))

    assert server.value("gen_ai_server_time_to_first_token_seconds_bucket", *CHAT, "0.25") == 0
    assert server.value("gen_ai_server_time_to_first_token_seconds_count", *CHAT) == 1
    assert server.value("gen_ai_server_time_to_first_token_seconds_sum", *CHAT) >= 0.3
    assert server.value("gen_ai_server_time_per_output_token_seconds_count", *CHAT) == 1
    assert server.value("gen_ai_server_request_duration_seconds_sum", *CHAT) >= 0.3
    assert server.value("gen_ai_client_token_usage_bucket", *CHAT, "input", "256.0") == 0
    assert server.value("gen_ai_client_token_usage_bucket", *CHAT, "input", "1024.0") == 1
    assert server.value("gen_ai_client_token_usage_sum", *CHAT, "output") == 2
    assert server.value("prompt_tokens_total", *CHAT) == 300
    assert server.value("generated_tokens_total", *CHAT) == 2
    assert server.value("cached_tokens_total", *CHAT) == 256
    assert server.value("prompt_tokens_total", *CHAT[:3], "text_completion", *CHAT[4:]) == 0


def test_answers_that_grow_side_by_side_share_the_time() -> None:
    """Of a request with n: 2, each of the two answers took the whole time for half of the tokens."""
    counts, item = LanguageCounts(), Answer(Prompt(prompt="Hello"))
    counts.record_chunk(item, TextChunk("a"))
    assert item.written
    item.written.first_token -= 1.0
    counts.record_chunk(item, TextChunk(finish_reason="stop"))
    counts.record_chunk(item, TextChunk(index=1, finish_reason="stop", usage=Usage.of(1, 22)))

    assert counts.token_s.sum == pytest.approx(0.1, rel=0.5)


def test_a_gauge_falls_again_and_is_each_workers_own() -> None:
    load, server = [EngineLoad(2, 1, 0.5)], TorchServe()

    def gauges() -> Mapping[Series, float]:
        return gauges_of({"write": own_engine(load[0])}, {"write": 0})

    first, second = (Publisher("flow", "1.0", dict, print, gauges, worker) for worker in ("9000", "9001"))
    told(first, server)
    load[0] = EngineLoad(0, 0, 0.25)
    told(first, server)
    load[0] = EngineLoad(7)
    told(second, server)

    where = ("flow", "1.0", "write", "openvino", "smol")
    assert [server.value(name, *where, "9000") for name in ("running", "waiting", "cache_usage")] == [0, 0, 0.25]
    assert [server.value(name, *where, "9001") for name in ("running", "waiting")] == [7, 0]
    assert (PREFIX + "cache_usage", (*where, "9001")) not in server.totals
    assert told(second, TorchServe()).totals == {}


def test_a_node_without_an_engine_of_its_own_has_no_such_metrics() -> None:
    names = {name for _, name, _ in series_of({"detect": NodeCounts()}, {})}

    assert not [name for name in names if "gen_ai" in name or "token" in name]


def whole_flow(path: Path) -> Graph:
    return read_graph(Project(path.parent.parent), path)


def test_a_workflow_of_language_models_has_its_own_duration(write: Callable[..., Path]) -> None:
    graph, whole = whole_flow(write("answer: {handler: upper}")), WorkflowCounts()
    whole.duration_s.observe(0.3)
    series = workflow_series(graph, whole, {"write": language_counts()}, None)
    server = told(Publisher("flow", "1.0", lambda: series, print))

    assert server.names["gen_ai_invoke_agent_duration_seconds_sum"] == [
        "workflow", "version", "gen_ai_agent_name", "gen_ai_operation_name",
    ]  # fmt: skip
    about = ("flow", "1.0", "flow", "invoke_workflow")
    assert server.value("gen_ai_invoke_agent_duration_seconds_sum", *about) == 0.3
    assert server.value("gen_ai_invoke_agent_duration_seconds_bucket", *about, "0.2") == 0
    assert server.value("gen_ai_invoke_agent_duration_seconds_bucket", *about, "0.4") == 1


def test_so_has_one_whose_models_another_server_counts_but_not_a_handler_nor_one_without_tokens(
    write: Callable[..., Path], project: Path
) -> None:
    flow, whole = whole_flow(write("answer: {handler: upper}")), WorkflowCounts()
    handler = whole_flow(project / "handlers" / "upper.yaml")

    assert workflow_series(flow, whole, {"ask": NodeCounts(usage=Usage.of(3, 4))}, None)
    assert workflow_series(flow, whole, {"detect": NodeCounts()}, None) == {}
    assert workflow_series(handler, whole, {"write": language_counts()}, None) == {}


def test_every_request_that_did_not_fail_is_in_it(write: Callable[..., Path]) -> None:
    with Workflow.load(write("answer: {handler: upper}")) as workflow:
        workflow([Text("a"), Text("bad"), Text("b")])

        assert workflow.engine.workflow_counts().duration_s.count == 2


class TestTheDirectHostsPage:
    """What workers say, as JSON, becomes the page."""

    class Workers:
        """Workers of one version, by their ids."""

        def __init__(self) -> None:
            self.said: dict[str, Any] = {}

        def states(self) -> list[Any]:
            workers = [SimpleNamespace(id=name) for name in self.said]
            return [SimpleNamespace(hosted=SimpleNamespace(key=("flow", "1.0")), workers=workers)]

        def ready(self, _: object) -> list[Any]:
            return [
                SimpleNamespace(record=SimpleNamespace(id=name), ask=lambda _, said=said: json.loads(json.dumps(said)))
                for name, said in self.said.items()
            ]

    @staticmethod
    def worker(engine: str, tokens: int, load: EngineLoad) -> dict[str, Any]:
        """What serving.py answers for a worker that has written so many tokens."""
        counts, item = language_counts(), Answer(Chat.of("Hello"))
        counts.record_chunk(item, TextChunk("a", finish_reason="stop", usage=Usage.of(3, tokens)))
        own = {"write": OwnEngine(engine, "smol", 16, lambda: load, lambda _item, _client, done: done(list))}
        of_workflow = {("", "torchserve_dag_kept_total", ()): tokens}
        return metrics_of(
            cast(
                "Service",
                SimpleNamespace(
                    metrics=lambda: series_of({"write": counts}, own) | of_workflow,
                    gauges=lambda: gauges_of(own, dict.fromkeys(own, 0)),
                ),
            )
        )

    def page(
        self, tmp_path: Path, workers: Workers, *, as_vllm: bool = False
    ) -> tuple[MetricsPage, Callable[[str], Any]]:
        page = MetricsPage(Door(State(tmp_path)), cast("Any", workers), vllm_names_of_all=as_vllm)

        def values(name: str) -> Any:
            return [(labels.get("worker"), value) for rest, labels, value in samples(page.text(), name) if not rest]

        return page, values

    def test_counters_add_up_and_gauges_are_each_workers(self, tmp_path: Path) -> None:
        workers = self.Workers()
        workers.said = {
            "a": self.worker("openvino", 5, EngineLoad(2, 1, 0.5)),
            "b": self.worker("openvino", 7, EngineLoad(3)),
        }
        _, values = self.page(tmp_path, workers)

        assert values(PREFIX + "running") == [("a", 2), ("b", 3)]
        assert values(PREFIX + "cache_usage") == [("a", 0.5)]
        assert (None, 12) in values(PREFIX + "generated_tokens")

    def test_what_belongs_to_a_whole_workflow_has_no_node(self, tmp_path: Path) -> None:
        workers = self.Workers()
        workers.said = {"a": self.worker("openvino", 5, EngineLoad()), "b": self.worker("openvino", 7, EngineLoad())}
        page, _ = self.page(tmp_path, workers)

        ((_, labels, value),) = samples(page.text(), "torchserve_dag_kept_total")
        assert (sorted(labels), value) == (["Hostname", "version", "workflow"], 12)

    def test_a_worker_that_has_ended_counts_on_and_has_no_gauges(self, tmp_path: Path) -> None:
        workers = self.Workers()
        workers.said = {"a": self.worker("openvino", 5, EngineLoad(2))}
        page, values = self.page(tmp_path, workers)
        page.text()
        workers.said = {"b": self.worker("openvino", 1, EngineLoad(1))}

        assert values(PREFIX + "running") == [("b", 1)]
        assert (None, 6) in values(PREFIX + "generated_tokens")

    @pytest.mark.parametrize(("engine", "as_vllm", "there"), [("openvino", False, False), ("openvino", True, True),
                                                              ("vllm", False, True)])  # fmt: skip
    def test_vllms_names_are_there_for_vllm_and_for_all_by_a_setting(
        self,
        tmp_path: Path,
        engine: str,
        as_vllm: bool,  # noqa: FBT001
        there: bool,  # noqa: FBT001
    ) -> None:
        workers = self.Workers()
        workers.said = {"a": self.worker(engine, 5, EngineLoad(2, 1, 0.5))}
        page, values = self.page(tmp_path, workers, as_vllm=as_vllm)

        assert values("vllm:num_requests_running") == ([("a", 2)] if there else [])
        assert values("vllm:kv_cache_usage_perc") == ([("a", 0.5)] if there else [])
        assert ((None, 5) in values("vllm:generation_tokens")) is there
        assert ("vllm:request_generation_tokens_bucket{" in page.text()) is there
        assert ('model_name="smol"' in page.text()) is there


@pytest.fixture
def published(write: Callable[..., Path]) -> set[str]:
    """The names of all series."""
    own, counts = {"a": own_engine(EngineLoad(cache_usage=0))}, {"a": language_counts()}
    whole = workflow_series(whole_flow(write("answer: {handler: upper}")), WorkflowCounts(), counts, KeptCounts())
    return {name for _, name, _ in (*series_of(counts, own), *gauges_of(own, dict.fromkeys(own, 0)), *whole)}


def test_the_pages_name_what_is_published_and_nothing_else(published: set[str]) -> None:
    docs = Path(__file__).parents[2] / "docs"
    table = (docs / "reference" / "metrics.md").read_text("utf-8")
    histograms = {name.removesuffix("_bucket") for name in published if name.endswith("_bucket")}
    gauges = {metric.name for metric in GAUGES}
    counters = {name for name in published - gauges if not name.startswith(tuple(histograms))}

    rows = dict(re.findall(r"^\| `((?:torchserve_dag|gen_ai)_\w+)(?:\{[^`]*)?` \| (\w+) \|", table, re.MULTILINE))
    kinds = [(counters, "counter"), (histograms, "histogram"), (gauges, "gauge")]
    assert rows == {name: kind for names, kind in kinds for name in names}
    ours = rf"(?:{PREFIX}|torchserve_dag_(?:not_)?kept_|gen_ai_(?:server|client|invoke)_)\w+"
    named = set(re.findall(ours, (docs / "metrics.md").read_text("utf-8")))
    assert named <= published | histograms | {PREFIX}


def test_the_dashboard_asks_for_series_that_there_are(published: set[str]) -> None:
    """And its panels for the data source that whoever imports it chooses."""
    dashboard = json.loads((Path(__file__).parents[2] / "deploy" / "grafana" / "language.json").read_text("utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    asked += [variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    names = {name for text in asked for name in re.findall(r"(?:torchserve_dag|gen_ai|vllm:)\w+", text)}

    assert names - {OPERATION, PROVIDER, MODEL, "gen_ai_token_type"} <= published
    assert len(asked) > len(panels) > 5
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
