"""A workflow as a Python object: loaded, warm, and callable without a server."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from torchserve_dag.runtime.compute.cores import cores, set_alone, share_cores
from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.engine.answered import Keep
from torchserve_dag.runtime.engine.counts import NodeCounts
from torchserve_dag.runtime.engine.engine import Engine
from torchserve_dag.runtime.engine.request import Request
from torchserve_dag.runtime.engine.streaming import SendChunk
from torchserve_dag.runtime.graph.graph import REQUEST, Graph
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.messages import FailedError, Failure
from torchserve_dag.runtime.models import load
from torchserve_dag.runtime.models.load import Loader, Reuse, decoder
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.telemetry import tracing

GPU_LANES = 2
"""Worker threads for a GPU: while the model infers one batch, another thread preprocesses the next."""


class Workflow:
    """A graph whose models are loaded.

        workflow = Workflow.load("workflows/detect_classify.yaml")
        answers = workflow([Path("coffee.jpg").read_bytes(), photo])

    Close it, or use it in a `with`, to end its threads.
    """

    def __init__(
        self,
        project: Project,
        graph: Graph,
        *,
        device: str | None = None,
        gpu: int | None = None,
        workers: int = 1,
        reuse: Reuse | None = None,
        keep: Keep | None = None,
    ) -> None:
        """Load every node. `device` overrides the device of all nodes; `workers` processes share this machine's cores;
        `reuse` gives handlers that are loaded already; `keep` gets each request's message with its answer.

        Raises CheckError, or ValueError for a device that is not there.
        """
        self.graph = graph
        lanes = max(1, cores() // workers)
        self._loaded = Loader(project, device, gpu, lanes * workers, reuse).load_graph(graph)
        share_cores(lanes * workers)  # functions may have imported torch
        devices = {name: loaded.device for name, loaded in self._loaded.items() if loaded.runner}
        self.own_engines = {name: one.own_engine for name, one in self._loaded.items() if one.own_engine}
        """By the names in `graph.codes`, of the nodes whose models have engines of their own."""
        at_once = [code.batch for code in graph.codes.values()] + [own.room for own in self.own_engines.values()]
        self._most_at_once = lanes + max(at_once)
        self.engine = Engine(
            graph,
            {
                REQUEST: decoder(graph.request, graph.serve.max_pixels),
                **{name: loaded.runner for name, loaded in self._loaded.items() if loaded.runner},
            },
            lanes={d: lanes if d == "cpu" else GPU_LANES for d in {"cpu", *devices.values()}},
            devices=devices,
            starters={name: loaded.starter for name, loaded in self._loaded.items() if loaded.starter},
            batch_starters={
                name: loaded.batch_starter for name, loaded in self._loaded.items() if loaded.batch_starter
            },
            own_engines=self.own_engines,
            observer=tracing.observer(),
            keep=keep,
            set_alone=set_alone,
        )

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None) -> Workflow:
        """The workflow in a project's `workflows/`, or the handler in its `handlers/`. Raises CheckError."""
        path = Path(path).resolve()
        project = Project(path.parent.parent)
        return cls(project, read_graph(project, path), device=device)

    def __call__(self, items: Sequence[Any], parameters: Mapping[str, str] | None = None) -> list[Any]:
        """The answers to many requests, in order; a Failure for a request that failed.

        An item is a message of the type that the workflow accepts, or its bytes.
        """
        return list(self.map(items, parameters))

    def map(self, items: Iterable[Any], parameters: Mapping[str, str] | None = None) -> Iterator[Any]:
        """The answers to any number of requests, in order, each as soon as it is there; a Failure where one failed.

        Items are taken as there is room for them: a few are in memory. Whoever leaves the loop cancels the rest.
        """
        window = 2 * self._most_at_once
        requests: deque[Request] = deque()
        try:
            for item in items:
                if len(requests) == window:  # the rest of a long list waits here, where its time limits do not run yet
                    yield requests.popleft().future.result()
                requests.append(self.submit(item, parameters))
            while requests:
                yield requests.popleft().future.result()
        finally:
            for request in requests:
                request.cancel()

    def stream(self, item: Any, parameters: Mapping[str, str] | None = None) -> Iterator[Any]:
        """The chunks of the answer to one request, as they come. Whoever leaves the loop cancels the request.

        Raises FailedError for a request that fails. A workflow that does not stream has its answer as the only chunk.
        """
        chunks: SimpleQueue[tuple[Any, Callable[[], None]] | None] = SimpleQueue()

        def send(chunk: Any, taken: Callable[[], None]) -> int:
            chunks.put((chunk, taken))
            return 0

        request = self.engine.submit(item, parameters, on_chunk=send)
        request.future.add_done_callback(lambda _: chunks.put(None))
        try:
            while arrived := chunks.get():
                chunk, taken = arrived
                taken()  # a node that yields is never far ahead of this loop
                yield chunk
        finally:
            request.cancel()
        answer = request.future.result()
        if isinstance(answer, Failure):
            raise FailedError(answer)
        if not self.graph.streams:
            yield answer

    def hangs(self) -> bool:
        """Whether a model hangs. A thread cannot be ended in Python, so only ending the process helps."""
        return self.engine.hangs() or any(loaded.hangs() for loaded in self._loaded.values())

    def submit(
        self,
        body: Any,
        parameters: Mapping[str, str] | None = None,
        *,
        request_id: str | None = None,
        options: Options | None = None,
        on_chunk: Callable[[Any], object] | None = None,
    ) -> Request:
        """Submit one request; see Engine.submit. `body` is a message, or what a client sent: bytes, a Body, Parts.

        A chunk is taken when `on_chunk` returns, which holds up a thread and the node that yields, and nothing else.
        """
        return self.engine.submit(
            body,
            parameters,
            request_id=request_id,
            options=options,
            on_chunk=_taken_at_once(on_chunk) if on_chunk else None,
        )

    def counts(self) -> dict[str, NodeCounts]:
        """The counters of each node."""
        return self.engine.counts()

    def close(self) -> None:
        self.engine.close()
        load.close(self._loaded.values())

    def __enter__(self) -> Workflow:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _taken_at_once(on_chunk: Callable[[Any], object]) -> SendChunk:
    def send(chunk: Any, taken: Callable[[], None]) -> int:
        on_chunk(chunk)
        taken()
        return 0

    return send
