"""A workflow as plain data, for programs."""

from __future__ import annotations

from typing import Any

from torchserve_dag.pictures.picture import LiveRates, picture
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.graph.graph import REQUEST, Code, Graph, Node


def as_data(graph: Graph, rates: LiveRates | None = None, within: str = "") -> dict[str, Any]:
    """A picture's content, and more. An edge to `null` leads to the answer, because any string may be a node's name."""
    edges = [
        {"from": arrow.start, "to": arrow.end or None, "kind": arrow.kind, "says": arrow.says, "types": arrow.types}
        for arrow in picture(graph).arrows
    ]
    data = {
        "name": graph.name,
        "version": graph.version,
        "takes": plain.name_of(graph.request),
        "answers": plain.name_of(graph.answer),
        "streams": graph.streams,
        "nodes": [_node(node, rates, within) for node in graph.nodes.values()],
        "edges": edges,
    }
    return data | ({"decoding": rates.get(REQUEST)} if rates and not within else {})


def _node(node: Node, rates: LiveRates | None, within: str) -> dict[str, Any]:
    return {
        "name": node.name,
        "depth": node.depth,
        "needs": sorted(node.needs),
        "each": {level.name: level.list.text for level in node.each},
        "when": node.when.text if node.when else None,
        "result": plain.name_of(node.result),
        "streams": node.streams,
        "branches": [
            {"when": branch.when.text if branch.when else None, **_code(branch.code, rates, within)}
            for branch in node.branches
        ],
        "repeat": {"until": node.repeat.until.text, "most": node.repeat.most} if node.repeat else None,
        "stops": {name: condition.text for name, condition in node.stops.items()},
        "on_error": node.policy.on_error,
        "default": plain.flatten(node.policy.default),
        "fallbacks": [_code(code, rates, within) for code in node.policy.fallbacks],
    }


def _code(code: Code, rates: LiveRates | None, within: str) -> dict[str, Any]:
    name = within + code.name
    kind = code.kind
    data = {
        "name": name,
        kind.key: as_data(code.inner, rates, f"{name}/") if code.inner else kind.reference,
        "gives": plain.name_of(code.gives),
        "batch": code.batch,
        "device": kind.device,
        "streams": code.yields,
        "timeout_s": code.attempts.timeout_s,
        "first_chunk_s": code.attempts.first_chunk_s,
        "after": code.attempts.after,
        "retries": code.attempts.retries,
        "circuit": plain.flatten(code.attempts.circuit),
    }
    return data | ({"live": rates.get(name)} if rates else {})
