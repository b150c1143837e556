"""A workflow as a tree of lines, for a terminal of any width."""

from __future__ import annotations

from collections.abc import Iterable

from torchserve_dag.pictures.picture import ANSWER, AS_IT_COMES, Arrow, LiveRates, Picture, Shape, picture
from torchserve_dag.runtime.graph.graph import REQUEST, Graph


def tree(graph: Graph, live: LiveRates | None = None) -> str:
    """Each node with what runs in it, and below it what it reads; sub-workflows are branches."""
    return "\n".join([f"{graph.name} {graph.version}", *_branches(picture(graph, live))]) + "\n"


def _branches(drawn: Picture) -> Iterable[str]:
    shapes = [shape for shape in drawn.shapes if shape.name != REQUEST]
    for shape in shapes:
        last = shape is shapes[-1]
        yield ("└─ " if last else "├─ ") + ": ".join([shape.title, *_runs(shape)])
        margin = "   " if last else "│  "
        yield from (margin + line for line in _below(shape, drawn.arrows))


def _runs(shape: Shape) -> Iterable[str]:
    """What runs in a node, in a line: `when …: this, batch 8; else: that`."""
    text, after_condition = "", False
    for row in shape.rows:
        before = "; " if row.kind == "when" else ": " if after_condition else ", "
        text += (before if text else "") + row.text
        after_condition = row.kind == "when"
    if text:
        yield text


def _below(shape: Shape, arrows: Iterable[Arrow]) -> Iterable[str]:
    for arrow in arrows:
        if arrow.end == shape.name:
            how = ", ".join(arrow.says) or ("after" if arrow.kind == "when" else "reads")
            source = "" if arrow.kind == "each" else f" {arrow.start or ANSWER}"
            if arrow.says == (AS_IT_COMES,):  # by a function that takes the chunks itself
                how, source = f"reads {arrow.start}", f" {AS_IT_COMES}"
            types = f": {', '.join(arrow.types)}" if arrow.types else ""
            yield f"{how}{source}{types}"
    for inner in shape.inner:
        yield from _branches(inner)
