"""What a worker prints for TorchServe to count, read as TorchServe reads it."""

from __future__ import annotations

import queue
import re
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchserve_dag.runtime.engine.counts import NodeCounts
from torchserve_dag.runtime.telemetry.metrics import Publisher, Series, publish_every, series_of

METRIC = re.compile(
    r"^(?:INFO > )?\[METRICS]"  # WorkerLifeCycle.java, then Metric.java, both of 0.12.0
    r"\s*([\w\s]+)\.([\w\s]+):([0-9\-,.e]+)\|#([^|]*)(\|#type:([^|,]+))?\|#hostname:([^,]+),([^,]+)(,(.*))?$"
)
PREFIX = "torchserve_dag_node_"
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
        assert found[6] == "COUNTER"
        names, values = [name for name, _ in pairs], tuple(value for _, value in pairs)
        assert self.names.setdefault(found[1], names) == names
        assert float(found[3]) >= 0
        self.totals[found[1], values] += float(found[3])

    def value(self, metric: str, *labels: str) -> float:
        assert (PREFIX + metric, labels) in self.totals, metric
        return self.totals[PREFIX + metric, labels]


def told(publisher: Publisher, server: TorchServe | None = None) -> TorchServe:
    server = server or TorchServe()
    for line in publisher.lines():
        server.read(line)
    return server


def test_a_histogram_has_the_series_that_prometheus_gives_one() -> None:
    counts = NodeCounts()
    counts.record_batch([0.003, 0.003, 20.0, 60.0], 0.7, 1)

    server = told(Publisher("flow", "1.0", lambda: series_of({"detect": counts}), print))

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
    server = told(Publisher("flow", "1.0", lambda: series_of({"detect": NodeCounts()}), print))

    assert set(server.totals.values()) == {0}
    assert server.value("failures_total", "flow", "1.0", "detect") == 0
    assert server.value("run_seconds_bucket", "flow", "1.0", "detect", "+Inf") == 0


def test_nothing_is_written_where_nothing_changed() -> None:
    counts, written = NodeCounts(), list[str]()
    publisher = Publisher("flow", "1.0", lambda: series_of({"detect": counts}), written.append)
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
    publisher = Publisher("flow", "1.0", lambda: series_of({"a": counts}), print)
    for waits, run_s, published in batches:
        counts.record_batch(waits, run_s, 0)
        if published:
            told(publisher, server)
    told(publisher, server)

    at_once = told(Publisher("flow", "1.0", lambda: series_of({"a": counts}), print))
    assert server.totals.keys() == at_once.totals.keys()
    assert list(server.totals.values()) == pytest.approx([at_once.totals[key] for key in server.totals])


def test_two_workers_add_up_and_a_worker_that_is_started_anew_takes_nothing_away() -> None:
    counts, server = NodeCounts(), TorchServe()
    counts.record_batch([0.1], 0.1, 0)
    for _ in range(3):
        told(Publisher("flow", "1.0", lambda: series_of({"a": counts}), print), server)

    assert server.value("items_total", "flow", "1.0", "a") == 3


def test_a_name_cannot_break_a_line() -> None:
    server = told(Publisher("a|b", "1.0", lambda: series_of({"c:d,e": NodeCounts()}), print))

    assert server.value("items_total", "a_b", "1.0", "c_d_e") == 0


def test_the_thread_publishes_and_the_last_counts_are_published_when_it_is_closed() -> None:
    counts, looked, written = NodeCounts(), threading.Semaphore(0), list[str]()

    def count() -> Mapping[Series, float]:
        looked.release()
        return series_of({"a": counts})

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

    publisher = publish_every(0.01, "flow", "1.0", lambda: series_of({"a": counts}), write)
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


def test_the_pages_name_what_is_published_and_nothing_else() -> None:
    docs = Path(__file__).parents[2] / "docs"
    table = (docs / "reference" / "metrics.md").read_text("utf-8")
    published = {
        name for name, _ in told(Publisher("flow", "1.0", lambda: series_of({"a": NodeCounts()}), print)).totals
    }
    histograms = {name.removesuffix("_bucket") for name in published if name.endswith("_bucket")}
    counters = {name for name in published if not name.startswith(tuple(histograms))}

    rows = dict(re.findall(rf"^\| `({PREFIX}\w+)` \| (\w+) \|", table, re.MULTILINE))
    assert rows == dict.fromkeys(counters, "counter") | dict.fromkeys(histograms, "histogram")
    assert set(re.findall(rf"{PREFIX}\w+", (docs / "metrics.md").read_text("utf-8"))) <= published | histograms
