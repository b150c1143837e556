"""One node of a `.war` export: the part of a workflow that TorchServe's own engine runs in one worker.

That engine passes bytes from node to node, gives the request only to the first node, and drops every status that a
node sets. So each edge carries an envelope: the request as it came, and the results of the models so far. Functions
run again in each segment that reads them. A failure travels in the envelope to the answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchserve_dag.runtime.data import codec, plain
from torchserve_dag.runtime.graph.graph import Graph, Node, Output, result_of
from torchserve_dag.runtime.graph.kinds import FunctionCode, HandlerCode
from torchserve_dag.runtime.graph.upstream import upstream
from torchserve_dag.runtime.messages import Failure

_MAGIC = b"TSDAG1\n"
REQUEST_PART = "request"
ABOUT_PART = "!about"  # no node can have a name like this or the next
FAILURE_PART = "!failure"


@dataclass(frozen=True)
class Segment:
    """Which part of a workflow's graph a worker runs."""

    graph: Graph
    """The graph of the whole workflow."""
    node: str
    """The model that this segment runs."""
    known: frozenset[str]
    """The models whose results come in the envelope."""
    last: bool
    """Whether this segment gives the workflow's answer."""

    def part(self) -> Graph:
        output = self.graph.output if self.last else Output({"": result_of(self.graph.nodes[self.node])})
        return self.graph.segment(output, self.known)

    def known_results(self, parts: Mapping[str, bytes]) -> dict[str, Any]:
        return {name: plain.build(self.graph.nodes[name].result, json.loads(parts[name])) for name in self.known}

    def seal(self, parts: Mapping[str, bytes], result: Any) -> bytes:
        """The worker's answer: the envelope with this segment's result or failure, or the workflow's answer."""
        if isinstance(result, Failure):
            failure = json.dumps(codec.failure_fields(result)).encode()
            return failure if self.last else pack({FAILURE_PART: failure})
        if self.last:
            return codec.encode(result)[0]
        return pack({**parts, self.node: plain.to_json(result)})


def unseal(row: Mapping[str, Any]) -> dict[str, bytes]:
    """The parts of all envelopes in the row of a node with parents: one envelope for each parent."""
    parts: dict[str, bytes] = {}
    for envelope in row.values():
        parts |= unpack(bytes(envelope))
    return parts


def pack(parts: Mapping[str, bytes]) -> bytes:
    """Named parts as one body: a line of JSON with their lengths, then the parts."""
    sizes = json.dumps({name: len(part) for name, part in parts.items()}).encode()
    return _MAGIC + sizes + b"\n" + b"".join(parts.values())


def unpack(body: bytes) -> dict[str, bytes]:
    end = body.index(b"\n", len(_MAGIC))
    sizes: dict[str, int] = json.loads(body[len(_MAGIC) : end])
    parts, at = {}, end + 1
    for name, size in sizes.items():
        parts[name] = body[at : at + size]
        at += size
    return parts


def segments(graph: Graph) -> dict[str, Segment]:
    """The segments of a workflow, one for each model, in order.

    Raises ValueError, with the reason, for a graph that TorchServe's own engine cannot run.
    """
    for node in graph.nodes.values():
        _refuse(node)
    models = {name: _models_before(graph, name) for name, node in graph.nodes.items() if _is_model(node)}
    if not models:
        raise ValueError("it has no model, and TorchServe 0.12.0 can lose the answer of a function node")
    starts = [name for name, before in models.items() if not before]
    if len(starts) > 1:
        raise ValueError(f"it starts with several models ({', '.join(starts)}), and TorchServe's engine wants one")
    for name in models:
        if not plain.fits_json(graph.nodes[name].result):
            raise ValueError(f"{name} gives {plain.name_of(graph.nodes[name].result)}, which does not fit an envelope")
    ends = [name for name in models if not any(name in before for before in models.values())]
    if len(ends) > 1:
        raise ValueError(
            f"it ends with several models ({', '.join(ends)}); the node that joins them would be a function, "
            "whose answer TorchServe 0.12.0 can lose"
        )
    return {name: Segment(graph, name, before, last=name == ends[0]) for name, before in models.items()}


def _refuse(node: Node) -> None:
    """Raises ValueError for a node that only our own engine can run."""
    others = [code.kind.noun for code in node.codes if not isinstance(code.kind, HandlerCode | FunctionCode)]
    models = [isinstance(code.kind, HandlerCode) for code in node.codes]
    beyond = {
        **dict.fromkeys(others, True),
        "an answer in chunks": node.streams,
        "several models to choose from": sum(models) > 1,
        "functions and models to choose from": len(set(models)) > 1,
        "rounds": node.repeat is not None,
        "nodes that it ends early": bool(node.stops),
    }
    for what, there in beyond.items():
        if there:
            raise ValueError(f"{node.name} has {what}")


def _is_model(node: Node) -> bool:
    return isinstance(node.code.kind, HandlerCode)


def parents(all_segments: Mapping[str, Segment], name: str) -> list[str]:
    """The segments whose envelopes a segment needs: the known ones that no other known segment already contains."""
    known = all_segments[name].known
    return [
        parent
        for parent in all_segments
        if parent in known and not any(parent in all_segments[other].known for other in known)
    ]


def _models_before(graph: Graph, name: str) -> frozenset[str]:
    """The models that a node's result depends on."""
    before = upstream(graph.nodes[name].needs, {other: node.needs for other, node in graph.nodes.items()})
    return frozenset(other for other in before if _is_model(graph.nodes[other]))
