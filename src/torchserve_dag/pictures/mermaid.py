"""A workflow as a Mermaid flowchart: types on the edges, a thick edge where items fan out."""

from __future__ import annotations

from collections.abc import Iterable

from torchserve_dag.pictures.picture import ANSWER, LiveRates, Picture, Shape, picture
from torchserve_dag.runtime.graph.graph import Graph

_ARROWS = {"value": "-->", "each": "==>", "when": "-.->"}
_WORDS = {
    "answer", "call", "classDef", "click", "default", "end", "flowchart", "graph", "href", "interpolate", "linkStyle",
    "style", "subgraph",
}  # fmt: skip
"""Node names that are reserved, in Mermaid or here; names that begin with _ are too."""


def mermaid(graph: Graph, live: LiveRates | None = None) -> str:
    """The text of the chart; with `live`, each node has its numbers, and the busiest the strongest colour."""
    return "\n".join(["flowchart LR", *_lines(picture(graph, live), "", "  ")]) + "\n"


def _lines(drawn: Picture, within: str, indent: str) -> Iterable[str]:
    for shape in drawn.shapes:
        lines = [indent + line for line in _shape(shape, within)]
        end = _id(shape.name, within)
        if shape.name == ANSWER:  # the arrows to it define it
            end = lines.pop().strip()
        yield from lines
        for arrow in drawn.arrows:
            if arrow.end == shape.name:
                label = "<br/>".join(map(_text, (*arrow.says, *arrow.types)))
                label = f'|"{label}"|' if label else ""
                yield f"{indent}{_id(arrow.start, within)} {_ARROWS[arrow.kind]}{label} {end}"


def _shape(shape: Shape, within: str) -> Iterable[str]:
    name = _id(shape.name, within)
    text = "<br/>".join([f"<b>{shape.title}</b>", *(_text(row.text) for row in shape.rows)])
    if shape.kind == "client":
        yield f'{name}(["{text}"])' if shape.rows else f"{name}([{shape.title}])"
    elif shape.inner:
        first = 1 if shape.rows[0].kind == "runs" else 0
        title = ": ".join([f"<b>{shape.title}</b>", *(_text(row.text) for row in shape.rows[:first])])
        yield f'subgraph {name}["{title}"]'
        yield "  direction LR"
        if more := [_text(row.text) for row in shape.rows[first:]]:  # in the title they would overlap the nodes inside
            yield f'  {name}-0>"{"<br/>".join(more)}"]'
        for i, inner in enumerate(shape.inner):
            yield from _lines(inner, f"{name}-{i}-" if i else f"{name}-", "  ")
        yield "end"
    else:
        yield f'{name}["{text}"]'
    if shape.heat:
        yield f"style {name} fill:{_heat(shape.heat)},color:#1f2328"


def _heat(share: float) -> str:
    """From a pale yellow to a strong orange."""
    pale, strong = (255, 248, 224), (255, 138, 48)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(pale, strong, strict=True))


def _id(name: str, within: str) -> str:
    if name == ANSWER:
        return f"{within}answer"
    return f"{within}node-{name}" if name in _WORDS or name.startswith("_") else within + name


def _text(text: str) -> str:
    text = " ".join(text.split())
    for character, entity in (("#", "#35;"), ("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "#quot;")):
        text = text.replace(character, entity)
    return text
