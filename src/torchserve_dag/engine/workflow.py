"""A workflow as a Python object: loaded, warm, and callable, with no server anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torchserve_dag import codec, placement
from torchserve_dag.engine.check import check
from torchserve_dag.engine.engine import Engine, NodeCounts
from torchserve_dag.engine.expression import compile_expression
from torchserve_dag.engine.graph import REQUEST, Graph, Node
from torchserve_dag.engine.runner import Runner, function_runner
from torchserve_dag.engine.torchserve_file import check_torchserve_file, is_torchserve_file
from torchserve_dag.handler import types_of
from torchserve_dag.project import Project
from torchserve_dag.rows import RowsRunner
from torchserve_dag.stages import Stages

GPU_LANES = 2
"""Batches under way on one GPU: while one is inferred, the next is being prepared."""


class Workflow:
    """A graph whose models are loaded.

        workflow = Workflow.load("workflows/detect_classify.yaml")
        answers = workflow([Path("coffee.jpg").read_bytes(), photo])

    Close it, or use it in a `with`, to end its threads.
    """

    def __init__(
        self, project: Project, graph: Graph, *, device: str | None = None, gpu: int | None = None, workers: int = 1
    ) -> None:
        """Load every node. `device` overrides all nodes'; `workers` share this machine's cores.

        Raises CheckError, or ValueError for a device that is not there.
        """
        self.graph = graph
        lanes = max(1, placement.cores() // workers)
        placement.share_cores(lanes * workers)
        loaded: dict[tuple[Path, str | None], Stages] = {}  # nodes that run one handler share its weights
        self._stages: dict[str, Stages] = {}
        for name, node in graph.nodes.items():
            if node.handler:
                key = (node.handler.path, device or node.device)
                loaded[key] = loaded.get(key) or project.load(node.handler, device=key[1], gpu=gpu, batch=node.batch)
                self._stages[name] = loaded[key]
        devices = {name: str(stages.placement.device) for name, stages in self._stages.items()}
        runners: dict[str, Runner] = {REQUEST: function_runner(_decoder(graph.request))}
        for name, node in graph.nodes.items():
            runners[name] = self._stages.get(name) or _runner(node, graph, gpu)
        self._most_at_once = lanes + max(node.batch for node in graph.nodes.values())
        self.engine = Engine(
            graph,
            runners,
            lanes={d: lanes if d == "cpu" else GPU_LANES for d in {"cpu", *devices.values()}},
            devices=devices,
            timeout_s=graph.serve.timeout_s,
        )

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None) -> Workflow:
        """The workflow in a project's `workflows/`, or the handler in its `handlers/`. Raises CheckError."""
        path = Path(path).resolve()
        project = Project(path.parent.parent)
        return cls(project, read_graph(project, path), device=device)

    def __call__(self, items: Sequence[Any], parameters: Mapping[str, str] | None = None) -> list[Any]:
        """The answers to many requests, in order; a Failure for each that has none.

        An item is a message of the type that the workflow takes, or its bytes.
        """
        window = 2 * self._most_at_once
        futures: list[Future[Any]] = []
        for i, item in enumerate(items):
            if i >= window:  # a long list waits outside, where no time limit runs
                futures[i - window].result()
            futures.append(self.submit(item, parameters))
        return [future.result() for future in futures]

    def stuck(self) -> bool:
        """Whether a model hangs. A thread cannot be ended in Python, so only ending the process helps."""
        return self.engine.stuck() or any(stages.hangs for stages in self._stages.values())

    def submit(
        self,
        body: Any,
        parameters: Mapping[str, str] | None = None,
        *,
        content_type: str | None = None,
        request_id: str | None = None,
        known: Mapping[str, Any] | None = None,
    ) -> Future[Any]:
        """One request. The future gives its answer or a Failure, at the workflow's time limit at the latest."""
        return self.engine.submit((body, content_type), parameters, request_id=request_id, known=known).future

    def counts(self) -> dict[str, NodeCounts]:
        """What each node has done so far."""
        return self.engine.counts()

    def close(self) -> None:
        self.engine.close()
        for stages in self._stages.values():
            stages.close()

    def __enter__(self) -> Workflow:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_graph(project: Project, path: Path) -> Graph:
    """The graph of a workflow's file; of a handler's file, the graph with it as the only node. Raises CheckError."""
    if path.parent.name == "handlers":
        return handler_graph(project, path)
    if is_torchserve_file(path):
        return check_torchserve_file(project, path)
    return check(project, path)


def handler_graph(project: Project, path: Path) -> Graph:
    """A handler as a workflow of one node, which is how it is served. Raises CheckError."""
    file = project.read_handler(path)
    kind = project.handler_class(file)
    project.settings(file, kind)
    takes, gives = types_of(kind)
    model = file.value
    node = Node(
        name=model.name,
        takes={"item": compile_expression(REQUEST, {REQUEST: takes})},
        each=None,
        when=None,
        sees_skipped=frozenset(),
        result=gives,
        needs=frozenset({REQUEST}),
        depth=1,
        handler=file,
        batch=model.run.batch,
        device=model.run.device,
    )
    return Graph(
        model.name, model.version, model.card.does, path, None, takes, {model.name: node}, model.name, model.serve
    )


def _decoder(kind: Any) -> Callable[[Any], Any]:
    """From a request's body and content type to the message; a message passes as it is."""

    def decode(request: tuple[Any, str | None]) -> Any:
        body, content_type = request
        if isinstance(body, bytes | bytearray | memoryview):
            return codec.decode(kind, bytes(body), content_type)
        return body

    return decode


def _runner(node: Node, graph: Graph, gpu: int | None) -> Runner:
    """What a node without a handler runs."""
    if node.function:
        return function_runner(node.function)
    rows = node.rows
    if rows and rows.archive:
        return RowsRunner.of_archive(node.name, rows.archive, gpu, node.batch, rows.retries)
    if rows and rows.function:
        return RowsRunner.of_function(node.name, rows.function, graph.path.parent, rows.retries)
    raise TypeError(f"{node.name} has nothing to run")
