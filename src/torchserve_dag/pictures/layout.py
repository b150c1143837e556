"""The places of boxes, labels and lines, in columns from left to right.

After Sugiyama: an edge over several columns becomes a chain of points, one in each column, and its label is one of
them. The points of each column are ordered by the mean place of their neighbours, which leaves few crossings, and then
moved apart as little as possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

_GAP, _TIGHT = 22.0, 9.0
"""The gap between two boxes in a column, and between labels or lines."""
_BEND = 26.0
"""The width of a line's bend."""
PORT = 12.0
"""The gap between two lines at the side of a box that is high enough."""
_SWEEPS = 24
_STILL = 0.05
"""The sweeps end when no point moves further than this."""
_STIFF = 30.0
"""The weight of a straight line, against 1 for a place near its boxes."""


@dataclass(slots=True, eq=False)
class Point:
    """A box, an edge's label, or a place where an edge crosses a column. `x` and `y` are its middle."""

    column: int
    """Boxes are in even columns, labels in odd ones."""
    width: float = 0.0
    height: float = 0.0
    x: float = 0.0
    y: float = 0.0
    gap: float = _TIGHT
    before: list[Point] = field(default_factory=list)
    after: list[Point] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Link:
    """An edge to be laid out, and the size of its label."""

    start: str
    end: str
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Route:
    level: Sequence[tuple[float, float, float]]
    """The level parts of the line: from x, to x, at y. Between them the line bends."""
    label: Point


@dataclass(frozen=True, slots=True)
class Layout:
    width: float
    height: float
    boxes: Mapping[str, Point]
    routes: Sequence[Route]
    """In the order of the links."""


def layout(sizes: Mapping[str, tuple[int, float, float]], links: Sequence[Link]) -> Layout:
    """Lay out boxes, given as (column, width, height) by name; a link leads to a later column."""
    boxes = {name: Point(2 * column, width, height, gap=_GAP) for name, (column, width, height) in sizes.items()}
    chains = [_chain(boxes[link.start], boxes[link.end], link) for link in links]
    points = [*boxes.values(), *(point for chain in chains for point in chain[1:-1])]
    columns: list[list[Point]] = [[] for _ in range(1 + max(point.column for point in points))]
    for point in points:
        columns[point.column].append(point)
    columns = _in_order(columns)
    _move_apart(columns)
    spans, width = _across(columns)
    top = min(point.y - point.height / 2 for point in points)
    for point in points:
        point.y -= top
    leave, arrive = _ports(boxes, chains, -1), _ports(boxes, chains, 1)
    routes = []
    for i, chain in enumerate(chains):
        start, end = chain[0], chain[-1]
        level = [(start.x + start.width / 2, spans[start.column][1], leave[i])]
        for point in chain[1:-1]:
            left, right = spans[point.column]
            bend = _BEND * (point.column % 2)
            level.append((left + bend, right - bend, point.y))
        level.append((spans[end.column][0], end.x - end.width / 2, arrive[i]))
        routes.append(Route(level, chain[-2]))
    return Layout(width, max(point.y + point.height / 2 for point in points), boxes, routes)


def _chain(start: Point, end: Point, link: Link) -> list[Point]:
    """The points of an edge: both boxes, and one in each column between them; the last of these is the label."""
    between = [Point(column) for column in range(start.column + 1, end.column)]
    between[-1].width, between[-1].height = link.width, link.height
    chain = [start, *between, end]
    for left, right in pairwise(chain):
        left.after.append(right)
        right.before.append(left)
    return chain


def _in_order(columns: list[list[Point]]) -> list[list[Point]]:
    """The columns, their points ordered so that few lines cross."""
    best, fewest = columns, _crossings(columns)
    for sweep in range(_SWEEPS):
        columns = [list(column) for column in columns]
        forward = sweep % 2 == 0
        for column in columns if forward else reversed(columns):
            place = {id(point): i for column in columns for i, point in enumerate(column)}
            means = {id(p): _mean([place[id(q)] for q in (p.before if forward else p.after)]) for p in column}
            column.sort(key=lambda point: means[id(point)])
        crossings = _crossings(columns)
        if crossings < fewest:
            best, fewest = columns, crossings
    return best


def _crossings(columns: Sequence[Sequence[Point]]) -> int:
    place = {id(point): i for column in columns for i, point in enumerate(column)}
    total = 0
    for column in columns:
        ends = [place[id(q)] for p in column for q in sorted(p.after, key=lambda q: place[id(q)])]
        total += sum(a > b for i, a in enumerate(ends) for b in ends[i + 1 :])
    return total


def _move_apart(columns: Sequence[Sequence[Point]]) -> None:
    """Give each point its y: near its neighbours in the chain, in its column's order, without overlaps."""
    for sweep in range(10 * _SWEEPS):
        furthest = 0.0
        for column in columns if sweep % 2 == 0 else reversed(columns):
            pulls = [_pull(point) for point in column]
            gaps = [(a.height + b.height) / 2 + (a.gap + b.gap) / 2 for a, b in pairwise(column)]
            for point, y in zip(column, spread(pulls, gaps), strict=True):
                furthest = max(furthest, abs(y - point.y))
                point.y = y
        if furthest < _STILL:
            break


def _pull(point: Point) -> tuple[float, float]:
    """The best y of a point, and its weight.

    Straight lines weigh more, and a box with many lines weighs less for each of them.
    """
    joined = [(q, len(q.after)) for q in point.before] + [(q, len(q.before)) for q in point.after]
    weights = [(_STIFF if q.gap == point.gap == _TIGHT else 1) / many**2 for q, many in joined]
    total = sum(weights) or 1.0
    return sum(q.y * weight for (q, _), weight in zip(joined, weights, strict=True)) / total, total


def spread(pulls: Sequence[tuple[float, float]], gaps: Sequence[float]) -> list[float]:
    """The places nearest to the wanted ones (weighted least squares) that keep the order and the gaps."""
    offsets = [0.0]
    for gap in gaps:
        offsets.append(offsets[-1] + gap)
    blocks: list[tuple[float, float, int]] = []  # mean, weight, count: pool adjacent violators
    for (want, pull), offset in zip(pulls, offsets, strict=False):
        mean, weight, count = want - offset, pull, 1
        while blocks and blocks[-1][0] > mean:
            other, more_weight, more = blocks.pop()
            mean = (mean * weight + other * more_weight) / (weight + more_weight)
            weight, count = weight + more_weight, count + more
        blocks.append((mean, weight, count))
    flat = [mean for mean, _, count in blocks for _ in range(count)]
    return [place + offset for place, offset in zip(flat, offsets, strict=False)]


def _across(columns: Sequence[Sequence[Point]]) -> tuple[list[tuple[float, float]], float]:
    """Give each point its x. Returns the span of each column, and the width of all."""
    spans: list[tuple[float, float]] = []
    left = 0.0
    for i, column in enumerate(columns):
        wide = max((point.width for point in column), default=0.0) + (2 * _BEND if i % 2 else 0)
        for point in column:
            point.x = left + wide / 2
        spans.append((left, left + wide))
        left += wide
    return spans, left


def _ports(boxes: Mapping[str, Point], chains: Sequence[list[Point]], side: int) -> dict[int, float]:
    """The y at which each line leaves its box (side -1) or reaches it (1): level with the next point, if possible."""
    leaves: dict[int, float] = {}
    for box in boxes.values():
        mine = [i for i, chain in enumerate(chains) if chain[-1 if side == 1 else 0] is box]
        beyond = {i: chains[i][-2 if side == 1 else 1].y for i in mine}
        mine.sort(key=lambda i: beyond[i])
        room = max(0.0, box.height / 2 - PORT * 0.7)
        gap = min(PORT, 2 * room / max(1, len(mine) - 1))
        ys = spread([(beyond[i], 1.0) for i in mine], [gap] * (len(mine) - 1))
        low, high = box.y - room, box.y + room
        for k, i in enumerate(mine):
            leaves[i] = min(max(ys[k], low + k * gap), high - (len(mine) - 1 - k) * gap)
    return leaves


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
