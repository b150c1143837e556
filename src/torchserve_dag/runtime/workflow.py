"""A workflow as a Python object: loaded, warm, and callable, with no server anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torchserve_dag.runtime.compat.runner import RowsRunner
from torchserve_dag.runtime.compute import placement
from torchserve_dag.runtime.data import codec
from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.engine.counts import NodeCounts
from torchserve_dag.runtime.engine.engine import Engine
from torchserve_dag.runtime.engine.request import Request
from torchserve_dag.runtime.engine.runner import Runner, function_runner, piece_runner
from torchserve_dag.runtime.graph.graph import REQUEST, Code, Graph, RowsCode
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.models.load import load_handler
from torchserve_dag.runtime.models.remote import ServedModel
from torchserve_dag.runtime.models.stages import Stages
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.telemetry import tracing

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
        runners: dict[str, Runner] = {REQUEST: function_runner("decode", _decoder(graph.request))}
        self._served: dict[str, ServedModel] = {}
        for name, code in graph.codes.items():
            if code.handler:
                key = (code.handler.path, device or code.device)
                loaded[key] = loaded.get(key) or load_handler(
                    project, code.handler, device=key[1], gpu=gpu, batch=code.batch
                )
                self._stages[name] = loaded[key]
                runners[name] = piece_runner(name, loaded[key].pieces) if code.yields else loaded[key]
            elif code.function:
                runner = piece_runner if code.yields else function_runner
                runners[name] = runner(code.function.__name__, partial(_by_name, code.function))
            elif code.rows:
                runners[name] = _rows_runner(code, code.rows, gpu)
            elif code.served:
                self._served[name] = ServedModel(code.served)
        devices = {name: str(stages.placement.device) for name, stages in self._stages.items()}
        self._most_at_once = lanes + max(code.batch for code in graph.codes.values())
        self.engine = Engine(
            graph,
            runners,
            lanes={d: lanes if d == "cpu" else GPU_LANES for d in {"cpu", *devices.values()}},
            devices=devices,
            starters=self._served,
            observer=tracing.observer(),
            set_alone=placement.set_alone,
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
        requests: list[Request] = []
        for i, item in enumerate(items):
            if i >= window:  # a long list waits outside, where no time limit runs
                requests[i - window].future.result()
            requests.append(self.submit(item, parameters))
        return [request.future.result() for request in requests]

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
        options: Options | None = None,
        on_piece: Callable[[Any], None] | None = None,
    ) -> Request:
        """One request; see Engine.submit. `body` is a message, or its bytes, which `content_type` says more about."""
        return self.engine.submit(
            (body, content_type),
            parameters,
            request_id=request_id,
            known=known,
            options=options,
            on_piece=on_piece,
        )

    def counts(self) -> dict[str, NodeCounts]:
        """What each node has done so far."""
        return self.engine.counts()

    def close(self) -> None:
        self.engine.close()
        for stages in self._stages.values():
            stages.close()
        for served in self._served.values():
            served.close()

    def __enter__(self) -> Workflow:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _by_name(function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    return function(**values)


def _decoder(kind: Any) -> Callable[[Any], Any]:
    """From a request's body and content type to the message; a message passes as it is."""

    def decode(request: tuple[Any, str | None]) -> Any:
        body, content_type = request
        if isinstance(body, bytes | bytearray | memoryview):
            return codec.decode(kind, bytes(body), content_type)
        return body

    return decode


def _rows_runner(code: Code, rows: RowsCode, gpu: int | None) -> RowsRunner:
    """A TorchServe handler, or a function of a TorchServe workflow."""
    if rows.function is None:
        return RowsRunner.of_archive(code.name, rows.file, gpu, code.batch, gives=code.gives)
    return RowsRunner.of_function(code.name, rows.file, rows.function)
