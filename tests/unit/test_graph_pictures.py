"""A workflow is drawn as it is: as Mermaid, as SVG, as data, and with what a server counted."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFont
from typer.testing import CliRunner

from tests.unit.conftest import Write
from torchserve_dag.commands import app
from torchserve_dag.pictures.data import as_data
from torchserve_dag.pictures.layout import Layout, Link, layout, spread
from torchserve_dag.pictures.mermaid import mermaid
from torchserve_dag.pictures.picture import NodeRates
from torchserve_dag.pictures.svg import svg
from torchserve_dag.pictures.tree import tree
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.rates import quantile, rates, read, watch

ROOT = Path(__file__).parents[2]
FUNCTIONS = """
    from collections.abc import Iterator
    @dataclass(frozen=True)
    class Page:
        lines: list[Text]
    def pages(text: Text) -> list[Page]: return [Page([text])]
    def twice(text: Text) -> Text: return text
    def size(text: Text) -> int: return len(text.text)
    def flat(texts: list[list[Text | Skipped]]) -> Text: return Text("")
    def both(one: Text, two: Text | Skipped) -> Text: return one
    def spell(text: Text) -> Iterator[Text]: yield text
    def label(name: str | None) -> Text: return Text(name or "")
"""
Draw = Callable[..., Graph]


@pytest.fixture
def graph(write: Write) -> Draw:
    """The checked graph of these nodes."""

    def read_it(nodes: str, output: str = "answer", functions: str = FUNCTIONS) -> Graph:
        path = write(nodes, functions, output)
        return read_graph(Project(path.parent.parent), path)

    return read_it


EVERYTHING = """
    pages: {function: pages}
    read:
      handler: upper
      each: {page: pages, line: page.lines}
      batch: 32
      device: cpu
      when: len(line.text) > 0 and line.text != "<b>"
      timeout_s: 2
      retry: 3
      on_error: skip
    flat: {function: flat, input: read}
    size: {function: size}
    route:
      input: flat
      switch:
        - {when: size > 100, handler: upper, batch: 8}
        - {when: size > 10, workflow: inner}
        - {served: {model: llm, at: "gpu:7070", takes: Text, gives: Text}}
      on_error: {fallback: {function: twice}}
    spell: {function: spell, input: route}
    loud: {handler: upper, each: spell, on_error: {default: {text: nothing}}}
    answer: {function: both, inputs: {one: flat, two: route}}
"""
OUTPUTS = '{"whole": answer, "size": size, "pieces": loud}'


@pytest.fixture
def everything(write: Write, project: Path, graph: Draw) -> Graph:
    inner = (
        'name: inner\nversion: "3.0"\ndoes: A test.\ncode: flow.py\nnodes:\n  upper: {handler: upper}\noutput: upper\n'
    )
    (project / "workflows" / "inner.yaml").write_text(inner)
    return graph(EVERYTHING, OUTPUTS)


def edges(graph: Graph) -> list[str]:
    return [
        line.strip() for line in mermaid(graph).splitlines() if "request([" not in line and re.search(r"->|=>", line)
    ]


def test_an_edge_has_the_type_of_what_goes_along(graph: Draw) -> None:
    drawn = graph(
        "size: {function: size}\nanswer: {function: both, inputs: {one: request, two: request}, when: size > 3}"
    )

    assert edges(drawn) == [
        'request -->|"Text"| size',
        'request -->|"Text"| node-answer',
        'size -.->|"when"| node-answer',
        'node-answer -->|"Text | Skipped"| answer([answer])',
    ]


def test_a_loop_is_a_thick_edge_with_its_items(everything: Graph) -> None:
    assert 'pages ==>|"each page in pages<br/>each line in page.lines<br/>Text"| read' in edges(everything)
    assert 'read -->|"list[list[Text | Skipped]]"| flat' in edges(everything)


def test_a_node_that_takes_chunks_as_they_come_says_so(everything: Graph) -> None:
    assert 'spell ==>|"each spell<br/>as it comes<br/>Text"| loud' in edges(everything)
    assert '  spell["<b>spell</b><br/>function<br/>in chunks"]' in mermaid(everything)


def test_each_output_has_an_arrow_with_its_name(everything: Graph) -> None:
    assert edges(everything)[-3:] == [
        'node-answer -->|"whole: Text"| answer([answer])',
        'size -->|"size: int"| answer([answer])',
        'loud -->|"pieces: list[Text]"| answer([answer])',
    ]


def test_a_node_says_what_runs_and_how(everything: Graph) -> None:
    assert (
        'read["<b>read</b><br/>when len(line.text) &gt; 0 and line.text != #quot;&lt;b&gt;#quot;<br/>upper 1.0<br/>'
        'batch 32, cpu<br/>timeout 2 s, retry 3<br/>on error skip"]'
    ) in mermaid(everything)
    assert 'on error {#quot;text#quot;: #quot;nothing#quot;}"]' in mermaid(everything)


def test_a_switch_shows_its_branches_and_a_workflow_what_is_inside(everything: Graph) -> None:
    text = mermaid(everything)
    inside = text[text.index("  subgraph route") : text.index("\n  end\n")]
    branches = ["when size &gt; 100", "upper 1.0", "batch 8", "when size &gt; 10", "workflow inner 3.0", "64 at a time"]
    branches += ["else", "llm @ gpu:7070", "64 at a time", "on error", "twice()"]

    assert inside.splitlines() == [
        '  subgraph route["<b>route</b>"]',
        "    direction LR",
        f'    route-0>"{"<br/>".join(branches)}"]',
        "    route-request([request])",
        '    route-upper["<b>upper</b><br/>upper 1.0"]',
        '    route-request -->|"Text"| route-upper',
        '    route-upper -->|"Text"| route-answer([answer])',
    ]


def test_names_that_mean_something_to_mermaid_are_written_otherwise(graph: Draw) -> None:
    text = mermaid(
        graph("end: {function: twice}\n_top: {function: twice, input: end}\nanswer: {function: twice, input: _top}")
    )

    assert '  node-end["<b>end</b><br/>twice()"]' in text
    assert '  node-end -->|"Text"| node-_top' in text
    assert '  node-_top -->|"Text"| node-answer' in text


def test_the_answer_of_a_stream_comes_in_chunks(graph: Draw) -> None:
    assert mermaid(graph("answer: {function: spell}")).endswith('answer(["<b>answer</b><br/>in chunks"])\n')


def test_a_node_that_reads_only_parameters_starts_with_the_request(graph: Draw) -> None:
    drawn = graph(
        "name: {function: label, input: parameters.name}\nanswer: {function: both, inputs: {one: request, two: name}}"
    )

    assert "request -.-> name" in edges(drawn)


# SVG.


def elements(picture: str) -> Iterator[ET.Element]:
    return ET.fromstring(picture).iter()  # noqa: S314 (our own)


def texts(picture: str) -> list[str]:
    return ["".join(one.itertext()) for one in elements(picture) if one.tag.endswith("}text")]


def test_the_picture_has_all_that_the_chart_has(everything: Graph) -> None:
    found = " ".join(texts(svg(everything)))

    for expected in (
        'when len(line.text) > 0 and line.text != "<b>"',
        "each page in pages each line in page.lines Text",
        "upper 1.0 batch 32, cpu timeout 2 s, retry 3 on error skip",
        "workflow inner 3.0",
        "llm @ gpu:7070",
        "whole: Text",
        "list[list[Text | Skipped]]",
        "each spell as it comes Text",
    ):
        assert expected in found


def test_a_tree_has_each_node_with_what_it_reads_in_lines_of_any_width(everything: Graph) -> None:
    lines = tree(everything).splitlines()

    assert lines[0] == "flow 1.0"
    assert [line[3:].partition(":")[0] for line in lines if line[:3] in {"├─ ", "└─ "}] == [*everything.nodes, "answer"]
    read = '├─ read: when len(line.text) > 0 and line.text != "<b>": upper 1.0, batch 32, cpu, timeout 2 s, retry 3'
    at = lines.index(f"{read}; on error skip")
    assert lines[at + 1] == "│  each page in pages, each line in page.lines: Text"
    assert "│  ├─ upper: upper 1.0" in lines  # the workflow inside `route`
    assert "   reads size: size: int" in lines


def test_the_same_workflow_gives_the_same_bytes(write: Write, everything: Graph) -> None:
    again = read_graph(Project(everything.path.parent.parent), everything.path)

    assert svg(everything) == svg(again)


def test_a_long_word_is_broken_and_nothing_is_lost(graph: Draw) -> None:
    long = " or ".join(f"request.text == {'.'.join(['part[one]'] * 12)!r}".replace("'", '"') for _ in range(2))
    found = texts(svg(graph(f"answer: {{handler: upper, when: '{long}'}}")))

    assert f"when{long}".replace(" ", "") in "".join(found).replace(" ", "")
    assert max(map(len, found)) < 50


def test_what_xml_cannot_hold_is_left_out(graph: Draw) -> None:
    picture = svg(graph('answer: {handler: upper, when: "request.text != \\"<&\\x07>\\""}'))

    assert any('!= "<& >"' in text for text in texts(picture))


def test_text_stays_in_its_box(everything: Graph) -> None:
    """Measured with another font than the one that the boxes are made for."""
    for group in (one for one in elements(svg(everything)) if one.tag.endswith("}g")):
        boxes = [one for one in group if one.tag.endswith("}rect")]
        for text in (one for one in group if one.tag.endswith("}text")):
            font = ImageFont.load_default(14 if text.get("class") == "title" else 12)
            length, x = font.getlength(text.text or ""), float(text.get("x", ""))
            left = x - length / 2 if text.get("text-anchor") else x
            assert left > 0
            assert left + length < float(boxes[0].get("width", ""))


def test_both_backgrounds_have_a_colour_for_every_class(everything: Graph) -> None:
    picture = svg(everything, {"read": RATES})
    light, _, dark = picture[picture.index("<style>") : picture.index("</style>")].partition(
        "@media (prefers-color-scheme: dark)"
    )
    used = {name for classes in re.findall(r'class="([^"]+)"', picture) for name in classes.split()}

    for name in used - {"runs", "title", "box"}:
        assert f".{name} " in light.replace(",", " ")
        assert f".{name} " in dark.replace(",", " ")


@pytest.mark.parametrize(
    ("file", "picture"),
    [
        ("detect_classify-2.0", "detect_classify"),
        ("describe_photo", "describe_photo"),
        ("chat_with_fallback", "chat_with_fallback"),
    ],
)
def test_the_picture_in_the_docs_is_drawn_from_its_file(file: str, picture: str) -> None:
    drawn = read_graph(Project(ROOT), ROOT / "workflows" / f"{file}.yaml")

    assert svg(drawn) == (ROOT / "docs" / "pictures" / f"{picture}.svg").read_text("utf-8")


# The layout.


@st.composite
def layered(draw: st.DrawFn) -> tuple[dict[str, tuple[int, float, float]], list[Link]]:
    """Boxes in columns, each joined to one of an earlier column or more, and their links."""
    side = st.floats(8, 200)
    columns = [1, *draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))]
    names = [[f"{i}.{k}" for k in range(count)] for i, count in enumerate(columns)]
    sizes = {name: (i, draw(side), draw(side)) for i, column in enumerate(names) for name in column}
    links = []
    for i, column in enumerate(names[1:], 1):
        earlier = [name for one in names[:i] for name in one]
        for name in column:
            starts = draw(st.lists(st.sampled_from(earlier), min_size=1, max_size=4, unique=True))
            links += [Link(start, name, draw(side), draw(st.floats(0, 60))) for start in starts]
    return sizes, links


@settings(max_examples=30)
@given(layered())
def test_boxes_and_labels_do_not_overlap(case: tuple[dict[str, tuple[int, float, float]], list[Link]]) -> None:
    placed = layout(*case)

    for one, other in combinations([*placed.boxes.values(), *(route.label for route in placed.routes)], 2):
        beside = abs(one.x - other.x) * 2 >= one.width + other.width - 1e-6
        assert beside or abs(one.y - other.y) * 2 >= one.height + other.height - 1e-6


@settings(max_examples=30)
@given(layered())
def test_a_level_line_does_not_run_through_a_box_or_a_label(
    case: tuple[dict[str, tuple[int, float, float]], list[Link]],
) -> None:
    placed = layout(*case)

    for route in placed.routes:
        things = [*placed.boxes.values(), *(other.label for other in placed.routes if other is not route)]
        for left, right, y in route.level:
            for thing in things:
                across = left < thing.x + thing.width / 2 - 1e-6 and right > thing.x - thing.width / 2 + 1e-6
                assert not (across and abs(y - thing.y) < thing.height / 2 - 1e-6)


@settings(max_examples=30)
@given(layered())
def test_a_line_goes_from_its_box_to_its_box(case: tuple[dict[str, tuple[int, float, float]], list[Link]]) -> None:
    placed: Layout = layout(*case)

    for link, route in zip(case[1], placed.routes, strict=True):
        start, end = placed.boxes[link.start], placed.boxes[link.end]
        assert route.level[0][0] == pytest.approx(start.x + start.width / 2)
        assert route.level[-1][1] == pytest.approx(end.x - end.width / 2)
        assert abs(route.level[0][2] - start.y) <= start.height / 2
        assert abs(route.level[-1][2] - end.y) <= end.height / 2
        assert all(one[1] <= other[0] + 1e-6 for one, other in pairwise(route.level))


def test_lines_that_need_not_cross_do_not(everything: Graph) -> None:
    placed = layout(
        {"a": (0, 10, 10), "b": (1, 10, 10), "c": (1, 10, 10), "d": (2, 10, 10), "e": (2, 10, 10)},
        [Link("a", "b", 5, 5), Link("a", "c", 5, 5), Link("b", "e", 5, 5), Link("c", "d", 5, 5)],
    )

    assert (placed.boxes["b"].y < placed.boxes["c"].y) == (placed.boxes["e"].y < placed.boxes["d"].y)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8), st.floats(0, 30))
def test_places_are_moved_no_more_than_they_must_be(wanted: list[float], gap: float) -> None:
    places = spread([(want, 1.0) for want in wanted], [gap] * (len(wanted) - 1))

    assert all(b - a >= gap - 1e-6 for a, b in pairwise(places))
    assert sum(places) == pytest.approx(sum(wanted), abs=1e-6)
    if all(b - a >= gap for a, b in pairwise(wanted)):
        assert places == pytest.approx(wanted)


# LiveRates.

RATES = NodeRates(
    items_s=12.5, failures_s=0.2, skipped_s=0, batch=6.25, run_s=0.148, run_p95_s=1.25, wait_s=0.0213, busy=0.9
)
COUNTED = """
# TYPE torchserve_dag_node_items_total counter
torchserve_dag_node_items_total{{workflow="flow",version="1.0",node="read",Hostname="a",}} {items}
torchserve_dag_node_items_total{{workflow="flow",version="1.0",node="read",Hostname="b",}} 5.0
torchserve_dag_node_items_total{{workflow="flow",version="2.0",node="read",Hostname="a",}} 7000.0
torchserve_dag_node_items_total{{workflow="flow",version="1.0",node="flat",Hostname="a",}} 4.0
torchserve_dag_node_failures_total{{workflow="flow",version="1.0",node="read",Hostname="a",}} {failures}
torchserve_dag_node_batch_size_sum{{workflow="flow",version="1.0",node="read",Hostname="a",}} {items}
torchserve_dag_node_batch_size_count{{workflow="flow",version="1.0",node="read",Hostname="a",}} {batches}
torchserve_dag_node_queue_seconds_sum{{workflow="flow",version="1.0",node="read",Hostname="a",}} {waits}
torchserve_dag_node_queue_seconds_count{{workflow="flow",version="1.0",node="read",Hostname="a",}} {items}
torchserve_dag_node_run_seconds_sum{{workflow="flow",version="1.0",node="read",Hostname="a",}} {runs}
torchserve_dag_node_run_seconds_count{{workflow="flow",version="1.0",node="read",Hostname="a",}} {batches}
torchserve_dag_node_run_seconds_bucket{{workflow="flow",version="1.0",node="read",le="+Inf",Hostname="a",}} {batches}
torchserve_dag_node_run_seconds_bucket{{workflow="flow",version="1.0",node="read",le="0.1",Hostname="a",}} {batches}
torchserve_dag_node_run_seconds_bucket{{workflow="flow",version="1.0",node="read",le="0.05",Hostname="a",}} 3.0
MemoryUtilization{{Level="Host",Hostname="a",}} 12.5
"""
"""As TorchServe prints it, in no order."""
BEFORE = COUNTED.format(items="10.0", failures="1.0", batches="3.0", waits="1.0", runs="0.3")
AFTER = COUNTED.format(items="60.0", failures="2.0", batches="13.0", waits="2.0", runs="1.1E0")


def test_rates_are_what_has_grown_between_two_readings() -> None:
    found = rates(read(BEFORE, "flow", "1.0"), read(AFTER, "flow", "1.0"), 10)

    assert set(found) == {"read"}
    assert found["read"] == NodeRates(
        items_s=5.0,
        failures_s=0.1,
        skipped_s=0.0,
        batch=5.0,
        run_s=pytest.approx(0.08),
        run_p95_s=pytest.approx(0.0975),
        wait_s=pytest.approx(0.02),
        busy=pytest.approx(0.08),
    )


def test_a_server_that_was_started_anew_counts_from_zero() -> None:
    assert rates(read(AFTER, "flow", "1.0"), read(BEFORE, "flow", "1.0"), 10) == {}


@pytest.mark.parametrize(
    ("share", "buckets", "expected"),
    [
        (0.5, [(1.0, 10.0), (2.0, 10.0)], 0.5),
        (0.95, [(1.0, 90.0), (2.0, 100.0)], 1.5),
        (0.95, [(1.0, 10.0), (float("inf"), 100.0)], 1.0),
        (0.95, [(1.0, 0.0), (float("inf"), 0.0)], 0.0),
        (0.95, [], 0.0),
    ],
)
def test_a_quantile_lies_within_its_bucket(share: float, buckets: list[tuple[float, float]], expected: float) -> None:
    assert quantile(share, buckets) == pytest.approx(expected)


def test_the_numbers_stand_in_the_nodes_and_the_busiest_is_the_strongest(everything: Graph) -> None:
    quick = NodeRates(100.0, 0, 0.5, 1, 0.0001, 0.0002, 0, 0.01)
    found = {"request": quick, "read": RATES, "route.inner/upper": quick}
    text, data = mermaid(everything, found), as_data(everything, found)

    assert "12.5 items/s, 6.25 a batch<br/>run 148 ms, p95 1.25 s<br/>wait 21.3 ms<br/>0.2 failures/s" in text
    assert "100 items/s, 1 a batch<br/>run 0.1 ms, p95 0.2 ms<br/>wait 0 ms<br/>0.5 skipped/s" in text
    assert 'flat["<b>flat</b><br/>function<br/>idle"]' in text
    assert "  style read fill:#ff8a30,color" in text
    assert "    style route-upper fill:#fff7de,color" in text
    picture = svg(everything, found)
    assert picture.count('class="box heat5"') == picture.count('class="box heat1"') == 1
    (inner,) = [branch["workflow"] for node in data["nodes"] for branch in node["branches"] if "workflow" in branch]
    assert inner["nodes"][0]["branches"][0]["live"] == quick


class Metrics(HTTPServer):
    """Answers like a server's metrics port: the first of the texts, then the next, and the last for ever."""

    def __init__(self, *texts: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.texts = list(texts)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Metrics

    def do_GET(self) -> None:
        body = (self.server.texts.pop(0) if len(self.server.texts) > 1 else self.server.texts[0]).encode()
        self.send_response(200 if self.path == "/metrics" else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., Metrics]]:
    started: list[tuple[Metrics, threading.Thread]] = []

    def start(*texts: str) -> Metrics:
        server = Metrics(*texts)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_is_asked_twice(serve: Callable[..., Metrics]) -> None:
    found = watch(serve(BEFORE, AFTER).address, "flow", "1.0", 0.05)

    assert 0 < found["read"].items_s <= 50 / 0.05
    assert found["read"].batch == 5.0


def test_a_server_without_traffic_or_without_the_workflow_is_said_to_be_so(serve: Callable[..., Metrics]) -> None:
    server = serve(BEFORE)

    with pytest.raises(ServerError, match=r"flow 1\.0 got no request within 0\.01 s"):
        watch(server.address, "flow", "1.0", 0.01)
    with pytest.raises(ServerError, match=r"has no metrics of flow 3\.0"):
        watch(server.address, "flow", "3.0", 0.01)


def test_a_server_that_does_not_answer_is_named() -> None:
    gone = Metrics("")
    gone.server_close()

    with pytest.raises(ServerError, match=re.escape(f"{gone.address}/metrics does not answer")):
        watch(gone.address, "flow", "1.0", 0.01)


# The command.


def run(project: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["graph", *words, "--project", str(project)])


def test_the_command_prints_mermaid_or_data(project: Path, everything: Graph) -> None:
    assert run(project, "flow").output == mermaid(everything)
    assert run(project, "flow/1.0").output == mermaid(everything)
    data = json.loads(run(project, "flow", "--json").output)
    assert data == json.loads(json.dumps(as_data(everything)))
    assert {"from": "size", "to": None, "kind": "value", "says": [], "types": ["size: int"]} in data["edges"]


def test_the_command_draws_a_handler_too(project: Path) -> None:
    assert '  upper["<b>upper</b><br/>upper 1.0"]' in run(project, "upper").output


def test_the_command_writes_what_the_file_ends_with(project: Path, everything: Graph) -> None:
    for name, expected in (("flow.svg", svg(everything)), ("flow.mmd", mermaid(everything))):
        assert run(project, "flow", "-o", str(project / name)).exit_code == 0
        assert (project / name).read_text("utf-8") == expected


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["flwo"], 'There is no workflow or handler "flwo"; did you mean "flow"?'),
        (["flow/9.0"], 'There is no workflow or handler "flow/9.0"; did you mean "flow"?'),
        (["flow", "-o", "flow.png"], "flow.png is neither an .svg nor an .mmd"),
        (["flow", "-o", "nowhere/flow.svg"], "nowhere/flow.svg: No such file or directory."),
        (["flow", "--live"], "No server of this project is running"),
    ],
)
def test_the_command_fails_with_a_sentence(project: Path, everything: Graph, words: list[str], sentence: str) -> None:
    done = run(project, *words)

    assert done.exit_code == 1
    assert sentence in done.output.replace("\n", " ")
