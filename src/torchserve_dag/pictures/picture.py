"""The content of a workflow's picture, for every format: shapes, the text in them, and the arrows between them."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.graph.graph import REQUEST, Code, Graph, Node
from torchserve_dag.runtime.graph.kinds import DrawnAs
from torchserve_dag.runtime.graph.types import without
from torchserve_dag.runtime.messages import Skipped

ANSWER = ""
"""The name of the shape that stands for the answer; no node can have it."""
AS_IT_COMES = "as it comes"
_LONGEST_DEFAULT = 60
_DRAWN_FIRST: tuple[DrawnAs, ...] = (
    "workflow",
    "served",
    "model",
    "function",
)
"""A node that may run code of several kinds is drawn as the first of these kinds that it has."""


@dataclass(frozen=True, slots=True)
class NodeRates:
    """The load of a node's code on a server, measured over a few seconds."""

    items_s: float
    """In items per second, like the next two."""
    failures_s: float
    skipped_s: float
    batch: float
    """The mean number of items in a batch."""
    run_s: float
    """The mean run time of a batch, in seconds, like the next two."""
    run_p95_s: float
    wait_s: float
    """The mean time of an item in the queue."""
    busy: float
    """Seconds of run time per second; more than 1 if batches ran at the same time."""


LiveRates = Mapping[str, NodeRates]
"""The rates of each code by its name; idle code is missing."""


@dataclass(frozen=True, slots=True)
class TextRow:
    """A line of text in a shape."""

    kind: Literal["runs", "how", "when", "policy", "live"]
    text: str


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    """The node's name, `request`, or ANSWER."""
    kind: Literal["client"] | DrawnAs
    column: int
    rows: tuple[TextRow, ...] = ()
    inner: tuple[Picture, ...] = ()
    """The sub-workflows that the node runs."""
    heat: float = 0.0
    """How busy the node was: 1 for the busiest node, 0 for an idle one."""

    @property
    def title(self) -> str:
        return self.name or "answer"


@dataclass(frozen=True, slots=True)
class Arrow:
    start: str
    end: str
    kind: Literal["value", "each", "when"]
    """`when`: the node at the end reads no value of the one at the start, but waits for it, or runs depending on it."""
    says: tuple[str, ...]
    """`each line in page.lines`, or `when`."""
    types: tuple[str, ...]
    """The types of the values; on an arrow to the answer, with the names of the outputs."""


@dataclass(frozen=True, slots=True)
class Picture:
    shapes: tuple[Shape, ...]
    arrows: tuple[Arrow, ...]


def picture(graph: Graph, live: LiveRates | None = None) -> Picture:
    """The picture of a workflow; with `live`, each node has its rates."""
    busy = [live[name].busy for name, code in graph.codes.items() if name in live and not code.inner] if live else []
    return _picture(graph, live, max(busy, default=0.0) or 1.0, "")


def _picture(graph: Graph, live: LiveRates | None, busiest: float, within: str) -> Picture:
    def shape(node: Node) -> Shape:
        inner = [(f"{within}{code.name}/", code.inner) for code in node.codes if code.inner]
        busy = [live[name].busy for code in node.codes if (name := within + code.name) in live] if live else []
        return Shape(
            node.name,
            _kind(node),
            node.depth,
            tuple(_rows(node, live, within)),
            tuple(_picture(workflow, live, busiest, prefix) for prefix, workflow in inner),
            0.0 if inner else min(1.0, max(busy, default=0.0) / busiest),
        )

    last = 1 + max((node.depth for node in graph.nodes.values()), default=0)
    request = Shape(REQUEST, "client", 0, () if within else tuple(_live_rows(live, REQUEST)))
    answer = Shape(ANSWER, "client", last, (TextRow("how", "in chunks"),) if graph.streams else ())
    arrows = [_arrow(need, node) for node in graph.nodes.values() for need in sorted(node.needs)]
    return Picture((request, *map(shape, graph.nodes.values()), answer), (*arrows, *_to_answer(graph)))


def _kind(node: Node) -> DrawnAs:
    drawn = {code.kind.drawn_as for code in node.codes}
    return next(kind for kind in _DRAWN_FIRST if kind in drawn)


def _rows(node: Node, live: LiveRates | None, within: str) -> Iterable[TextRow]:
    if node.when:
        yield TextRow("when", f"when {node.when.text}")
    for branch in node.branches:
        if len(node.branches) > 1:
            yield TextRow("when", f"when {branch.when.text}" if branch.when else "else")
        yield from _code_rows(branch.code, node, live, within)
    yield from _attempts_rows(node.code)
    if node.repeat:
        yield TextRow("policy", f"repeat until {node.repeat.until.text}, at most {node.repeat.most}")
    for target, condition in node.stops.items():
        yield TextRow("policy", f"ends {target} when {condition.text}")
    policy = node.policy
    for code in policy.fallbacks:
        yield TextRow("when", "on error" if code.attempts.after == "any" else "on transient error")
        yield from _code_rows(code, node, live, within)
        yield from _attempts_rows(code)
    if policy.on_error in {"skip", "default"}:
        text = json.dumps(plain.flatten(policy.default), ensure_ascii=False, default=str)
        text = text if len(text) <= _LONGEST_DEFAULT else f"{text[:_LONGEST_DEFAULT]}…"
        yield TextRow("when", "on error skip" if policy.on_error == "skip" else f"on error {text}")


def _attempts_rows(code: Code) -> Iterable[TextRow]:
    attempts = code.attempts
    limits = [f"timeout {attempts.timeout_s:g} s"] if attempts.timeout_s is not None else []
    limits += [f"first chunk in {attempts.first_chunk_s:g} s"] if attempts.first_chunk_s is not None else []
    limits += [f"retry {attempts.retries}"] if attempts.retries else []
    if circuit := attempts.circuit:
        limits.append(f"not tried for {circuit.open_s:g} s after {circuit.failures} failures")
    if limits:
        yield TextRow("policy", ", ".join(limits))


def _code_rows(code: Code, node: Node, live: LiveRates | None, within: str) -> Iterable[TextRow]:
    yield TextRow("runs", _what_runs(code, node))
    in_flight = code.kind.elsewhere and not code.kind.one_at_a_time
    how = [f"{code.batch} at a time" if in_flight else f"batch {code.batch}"] if code.batch > 1 else []
    how += [code.kind.device] if code.kind.device not in {None, "auto"} else []
    how += ["in chunks"] if code.yields else []
    if how:
        yield TextRow("how", ", ".join(how))
    yield from _live_rows(live, within + code.name)


def _what_runs(code: Code, node: Node) -> str:
    """`yolo_detector 1.0`, `crop()`, `summariser @ 127.0.0.1:7070`."""
    title = code.kind.title
    if code.kind.key != "function":
        return title
    return "function" if title == node.name else f"{title}()"


def _live_rows(live: LiveRates | None, name: str) -> Iterable[TextRow]:
    if live is None:
        return
    rates = live.get(name)
    if rates is None:
        yield TextRow("live", "idle")
        return
    batch = f", {_number(rates.batch)} a batch" if rates.batch else ""
    yield TextRow("live", f"{_number(rates.items_s)} items/s{batch}")
    if rates.run_s:
        yield TextRow("live", f"run {_time(rates.run_s)}, p95 {_time(rates.run_p95_s)}")
        yield TextRow("live", f"wait {_time(rates.wait_s)}")
    lost = {"failures": rates.failures_s, "skipped": rates.skipped_s}
    if any(lost.values()):
        yield TextRow("live", ", ".join(f"{_number(rate)} {what}/s" for what, rate in lost.items() if rate))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{round(value, 2):.3g}"  # noqa: PLR2004


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{_number(seconds * 1000)} ms"


def _arrow(need: str, node: Node) -> Arrow:
    read, says, element = {need}, [], None
    for level in node.each:
        if level.list.names & read:
            read.add(level.name)
            element = _element(level.list.type)
            says.append(("each " if level.name == "item" else f"each {level.name} in ") + level.list.text)
    if need in node.needs - node.waits_for:
        says.append(AS_IT_COMES)
    taken = [
        _element(value.type) if code.feeds.get(parameter) == need else value.type
        for code in node.codes
        for parameter, value in code.takes.items()
        if need in value.names
    ]
    types = dict.fromkeys(plain.name_of(kind) for kind in [element, *taken] if kind not in {None, Any})
    kind: Literal["value", "each", "when"] = "each" if says else "value" if taken else "when"
    conditions = [node.when, *(branch.when for branch in node.branches)]
    if kind == "when" and any(condition and need in condition.names for condition in conditions):
        says.append("when")
    return Arrow(need, node.name, kind, tuple(says), tuple(types))


def _element(kind: Any) -> Any:
    """The type of a list's elements."""
    arguments = typing.get_args(without(kind, Skipped))
    return arguments[0] if arguments else Any


def _to_answer(graph: Graph) -> list[Arrow]:
    types: dict[str, list[str]] = {}
    for name, value in graph.output.values.items():
        kind = "" if value.type is Any else plain.name_of(value.type)
        for need in sorted(value.names & {REQUEST, *graph.nodes}):
            types.setdefault(need, []).append(": ".join(part for part in (name, kind) if part))
    return [Arrow(need, ANSWER, "value", (), tuple(filter(None, lines))) for need, lines in types.items()]
