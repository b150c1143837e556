"""A workflow as an SVG picture, readable on light and on dark, the same bytes for the same workflow."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

from torchserve_dag.pictures.layout import PORT, Link, Route, layout
from torchserve_dag.pictures.picture import Arrow, LiveRates, Picture, Shape, picture
from torchserve_dag.runtime.graph.graph import Graph

_WIDTHS = {0.36: " '!ijl,./:;\\|IJf-", 0.43: '"()[]tr·', 0.59: "*_`cszk?xvyFL", 0.65: "", 0.86: "#+<=>^~wM&OQDGHNm%"}
"""The widths of characters in DejaVu Sans, as shares of the font size: the widest of the fonts that the style names."""
_WIDTH = {character: width for width, characters in _WIDTHS.items() for character in characters}
_SIZES = {"title": 14.0, "label": 11.0}
_SIZE = 12.0
"""The font size of a row's text."""
_LONGEST = {"label": 130.0}
_LONG = 205.0
"""The width at which a line of text is wrapped, if possible."""
_LINE, _PAD, _HEATS, _MARGIN = 1.35, 12.0, 5, 16.0

_LIGHT = {"paper": "#ffffff", "ink": "#1f2328", "quiet": "#59636e", "line": "#6e7781", "amber": "#8a4600",
          "live": "#0a3069", "client": "#f0f1f3", "model": "#ddf0ff", "function": "#f6f8fa", "served": "#f1e8ff",
          "workflow": "#ffffff", "heat1": "#fff4dc", "heat2": "#ffe5b8", "heat3": "#ffd28c", "heat4": "#ffb95e",
          "heat5": "#ff9d3c"}  # fmt: skip
_DARK = {"paper": "#0d1117", "ink": "#e6edf3", "quiet": "#9198a1", "line": "#8b949e", "amber": "#f0b072",
         "live": "#a5d6ff", "client": "#21262d", "model": "#12304f", "function": "#161b22", "served": "#32235a",
         "workflow": "#0d1117", "heat1": "#2b2113", "heat2": "#42300f", "heat3": "#5c3d0b", "heat4": "#7a4706",
         "heat5": "#9a4f00"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Drawn:
    width: float
    height: float
    parts: Sequence[str]


def svg(graph: Graph, live: LiveRates | None = None) -> str:
    """The picture; with `live`, each node has its numbers, and the busiest the strongest colour."""
    drawn = _picture(picture(graph, live))
    width, height = drawn.width + 2 * _MARGIN, drawn.height + 2 * _MARGIN
    name = escape(f"{graph.name} {graph.version}")
    size = f'width="{_n(width)}" height="{_n(height)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {_n(width)} {_n(height)}" role="img">'
    style = f"<style>{_rules(_LIGHT)}\n@media (prefers-color-scheme: dark) {{{_rules(_DARK)}\n}}</style>"
    body = [f'<rect class="paper" {size}/>', *_moved(drawn.parts, _MARGIN, _MARGIN)]
    return "\n".join([head, f"<title>{name}</title>", style, *body, "</svg>"]) + "\n"


def _rules(colours: dict[str, str]) -> str:
    of = colours.__getitem__
    rules = [
        f"text {{ font-family: Helvetica, Arial, sans-serif; fill: {of('ink')} }}",
        "text { font-size: 12px } .title { font-size: 14px; font-weight: bold } .label { font-size: 11px }",
        f".how, .policy, .label {{ fill: {of('quiet')} }}",
        f".when {{ fill: {of('amber')} }} .live {{ fill: {of('live')} }}",
        f".paper, .halo {{ fill: {of('paper')} }} .box {{ stroke: {of('line')} }} .outline {{ stroke-dasharray: 5 3 }}",
        f".line {{ fill: none; stroke: {of('line')}; stroke-width: 1.4 }} .head {{ fill: {of('line')} }}",
        f".fan {{ stroke-width: 5 }} .core {{ fill: none; stroke: {of('paper')}; stroke-width: 2.2 }}",
        ".ask { stroke-dasharray: 4 4 }",
        *(f".{kind} {{ fill: {of(kind)} }}" for kind in ("client", "model", "function", "served", "workflow")),
        *(f".heat{i} {{ fill: {of(f'heat{i}')} }}" for i in range(1, _HEATS + 1)),
    ]
    return "".join(f"\n{rule}" for rule in rules)


def _picture(drawn: Picture) -> _Drawn:
    lines = Counter([("out", arrow.start) for arrow in drawn.arrows] + [("in", arrow.end) for arrow in drawn.arrows])
    boxes = {s.name: _box(s, max(lines["out", s.name], lines["in", s.name])) for s in drawn.shapes}
    sizes = {shape.name: (shape.column, boxes[shape.name].width, boxes[shape.name].height) for shape in drawn.shapes}
    labels = [_label([line for text in (*a.says, *a.types) for line in _wrap("label", text)]) for a in drawn.arrows]
    links = [Link(a.start, a.end, label.width, label.height) for a, label in zip(drawn.arrows, labels, strict=True)]
    placed = layout(sizes, links)
    parts = [part for a, route in zip(drawn.arrows, placed.routes, strict=True) for part in _line(a, route)]
    over = [*zip(labels, (route.label for route in placed.routes), strict=True)]
    over += [(boxes[name], point) for name, point in placed.boxes.items()]
    for label, point in over:
        parts += _moved(label.parts, point.x - label.width / 2, point.y - label.height / 2)
    return _Drawn(placed.width, placed.height, parts)


def _box(shape: Shape, lines: int) -> _Drawn:
    """A box: its title and rows, the workflows inside it below, and room for `lines` lines at each side."""
    texts = [("title", shape.title), *((row.kind, line) for row in shape.rows for line in _wrap(row.kind, row.text))]
    inner = [_picture(workflow) for workflow in shape.inner]
    several = sum(row.kind == "runs" for row in shape.rows) > 1
    indents = [_PAD if several and kind in {"runs", "how", "live"} else 0.0 for kind, _ in texts]
    wide = [indent + _measure(kind, text) for indent, (kind, text) in zip(indents, texts, strict=True)]
    width = 2 * _PAD + max([*wide, *(drawn.width for drawn in inner)])
    text_height = sum(_height(kind) for kind, _ in texts)
    height = max(text_height + 1.2 * _PAD, 0.0 if inner else (lines + 1) * PORT)
    y = _PAD * 0.6 if inner else (height - text_height) / 2
    parts: list[str] = []
    for indent, (kind, text) in zip(indents, texts, strict=True):
        y += _height(kind)
        look = "runs" if shape.heat and kind != "title" else kind  # no other colour of text is readable on every heat
        parts.append(_text(look, _PAD + indent if several or inner else None, width, y, text))
    for drawn in inner:
        parts += _moved(drawn.parts, (width - drawn.width) / 2, height)
        height += drawn.height + _PAD
    look = f"heat{max(1, math.ceil(shape.heat * _HEATS))}" if shape.heat else shape.kind
    look = f"box {look} outline" if shape.kind == "workflow" else f"box {look}"
    corner = _n(min(height / 2, 18) if shape.kind == "client" else 6)
    box = f'<rect class="{look}" width="{_n(width)}" height="{_n(height)}" rx="{corner}"/>'
    return _Drawn(width, height, [box, *parts])


def _line(arrow: Arrow, route: Route) -> Iterable[str]:
    """The line of a route, with an arrowhead at its end."""
    from_, x, y = route.level[-1]
    levels = [*route.level[:-1], (min(from_, x - 8), x - 8, y)]
    path = f"M{_n(levels[0][0])} {_n(levels[0][2])}H{_n(levels[0][1])}"
    for (_, x0, y0), (x1, x2, y1) in pairwise(levels):
        half = _n((x0 + x1) / 2)
        path += f"C{half} {_n(y0)} {half} {_n(y1)} {_n(x1)} {_n(y1)}H{_n(x2)}"
    kind = {"value": "line", "each": "line fan", "when": "line ask"}[arrow.kind]
    yield f'<path class="{kind}" d="{path}"/>'
    if arrow.kind == "each":
        yield f'<path class="core" d="{path}"/>'
    yield f'<path class="head" d="M{_n(x - 9)} {_n(y - 5)}L{_n(x)} {_n(y)}L{_n(x - 9)} {_n(y + 5)}Z"/>'


def _label(lines: Sequence[str]) -> _Drawn:
    """The label of an edge; its background hides the line."""
    if not lines:
        return _Drawn(0.0, 0.0, ())
    width, height = max(_measure("label", line) for line in lines) + 8, len(lines) * _height("label")
    halo = f'<rect class="halo" width="{_n(width)}" height="{_n(height)}"/>'
    texts = [_text("label", None, width, (i + 1) * _height("label"), line) for i, line in enumerate(lines)]
    return _Drawn(width, height, [halo, *texts])


def _text(kind: str, left: float | None, width: float, below: float, text: str) -> str:
    """A line of text that begins at `left`; with None it is centred in the width."""
    place = f'x="{_n(width / 2)}" text-anchor="middle"' if left is None else f'x="{_n(left)}"'
    shown = "".join(c if c.isprintable() else " " for c in text)
    return f'<text class="{kind}" {place} y="{_n(below - 0.26 * _height(kind))}">{escape(shown)}</text>'


def _moved(parts: Sequence[str], x: float, y: float) -> list[str]:
    return [f'<g transform="translate({_n(x)} {_n(y)})">', *parts, "</g>"]


def _height(kind: str) -> float:
    """The height of a line of text."""
    return _LINE * _SIZES.get(kind, _SIZE)


def _measure(kind: str, text: str) -> float:
    """The greatest width of a text."""
    share = 1.13 if kind == "title" else 1.0  # bold
    return share * _SIZES.get(kind, _SIZE) * sum(_WIDTH.get(c, 0.65 if c.isascii() else 1.0) for c in text)


def _wrap(kind: str, text: str) -> list[str]:
    """The text in lines that are not too long: broken after a space, or in a long word after a bracket or a dot."""
    longest = _LONGEST.get(kind, _LONG)
    words = re.split(r"(?<=\s)(?=\S)", text)
    parts = [p for w in words for p in ([w] if _measure(kind, w) <= longest else re.split(r"(?<=[\[.,])", w))]
    lines = [""]
    for part in parts:
        if lines[-1] and _measure(kind, lines[-1] + part.rstrip()) > longest:
            lines.append("")
        lines[-1] += part
    return [line.strip() for line in lines]


def _n(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")
