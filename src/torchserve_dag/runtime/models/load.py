"""Loads the code of a graph's nodes: handlers, which are warmed up, functions, clients of served models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torchserve_dag.runtime.compat import archive as archives
from torchserve_dag.runtime.compat import functions
from torchserve_dag.runtime.compute.cores import share_cores
from torchserve_dag.runtime.data.declared import as_declared
from torchserve_dag.runtime.data.parts import Body, Parts, read
from torchserve_dag.runtime.data.source import Source
from torchserve_dag.runtime.engine.runner import (
    BatchStarter,
    OwnEngine,
    Runner,
    Starter,
    feed_runner,
    function_runner,
    stream_runner,
)
from torchserve_dag.runtime.graph.graph import Code, Graph
from torchserve_dag.runtime.graph.kinds import FunctionCode, HandlerCode, ServedCode
from torchserve_dag.runtime.graph.torchserve.kinds import ArchiveCode, RowsFunctionCode
from torchserve_dag.runtime.handler import ContinuousHandler, types_of
from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.models.continuous import ContinuousModel
from torchserve_dag.runtime.models.handler_process import HandlerProcess, HandlerSpec
from torchserve_dag.runtime.models.served import ServedModel
from torchserve_dag.runtime.models.stages import Stages
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.project.handler_file import HandlerFile
from torchserve_dag.runtime.project.weight_cache import link_weights


@dataclass(frozen=True, slots=True)
class Loaded:
    """A node's code, ready to run after `wait`: exactly one of a runner and two kinds of starters."""

    runner: Runner | None = None
    starter: Starter | None = None
    batch_starter: BatchStarter | None = None
    own_engine: OwnEngine | None = None
    """Of code that gives chunks of many items as they come."""
    wait: Callable[[], None] = lambda: None
    """Waits until the code is loaded. Raises RuntimeError if it cannot be."""
    device: str = "cpu"
    hangs: Callable[[], bool] = lambda: False
    """Whether a call did not return in time. Its thread cannot be ended."""
    close: Callable[[], None] = lambda: None
    join: Callable[[], None] = lambda: None
    """Waits, for a few seconds, until nothing of it is left after `close`."""


LoadedHandler = Stages | ContinuousModel

Reuse = Callable[[Source[HandlerFile], str, Callable[[], LoadedHandler]], LoadedHandler]
"""Gives a handler on a device, which it may have loaded for an earlier graph; the third argument loads one. Whoever has
such a function closes the handlers that it gave."""


class Loader:
    """Loads the code of one graph's nodes. Nodes that run one handler on one device share its weights."""

    def __init__(
        self, project: Project, device: str | None, gpu: int | None, lanes: int, reuse: Reuse | None = None
    ) -> None:
        """`device` overrides every node's; `gpu`: the number of the GPU that `auto` means; `lanes`: see Placement."""
        self._reuse = reuse
        self._project = project
        self._device = device
        self._gpu = gpu
        self._lanes = lanes
        self._handlers: dict[tuple[Path, str], LoadedHandler] = {}

    def load_graph(self, graph: Graph) -> dict[str, Loaded]:
        """By the name in `graph.codes`; a sub-workflow has no entry, because the engine itself runs it.

        Raises CheckError, or ValueError for a device that is not there.
        """
        codes = {name: code for name, code in graph.codes.items() if not code.inner}
        limits = graph.time_limits
        loaded: dict[str, Loaded] = {}
        try:
            # Processes load while the others do.
            for name, code in sorted(codes.items(), key=lambda named: not named[1].kind.one_at_a_time):
                loaded[name] = self.load_code(name, code, graph.serve.startup_timeout_s, limits[name])
            for one in loaded.values():
                one.wait()
        except BaseException:
            close(loaded.values())
            raise
        return loaded

    def load_code(self, name: str, code: Code, startup_s: float, limit_s: float) -> Loaded:
        """Load the code of a node. A new kind of code gets its case here.

        A process of its own is loaded within `startup_s`, and runs a batch within `limit_s`.
        """
        match code.kind:
            case HandlerCode(file, device):
                handler = self._handler(file, self._device or device, code.batch)
                close = _do_nothing if self._reuse else handler.close
                if isinstance(handler, ContinuousModel):
                    own = handler.own_engine
                    return Loaded(starter=handler, own_engine=own, hangs=lambda: handler.hangs, close=close)
                runner = stream_runner(name, handler.stream) if code.yields else handler
                return Loaded(runner, device=str(handler.placement.device), hangs=lambda: handler.hangs, close=close)
            case FunctionCode(function):
                over_chunks = partial(feed_runner, feeds=frozenset(code.feeds))
                make = over_chunks if code.feeds else stream_runner if code.yields else function_runner
                check = as_declared(code.gives, name, also=(Failure,))
                return Loaded(make(function.__name__, partial(_by_name, function), check))
            case ArchiveCode() | RowsFunctionCode():
                process = HandlerProcess(*self._process(code, code.kind, startup_s, limit_s))
                return Loaded(batch_starter=process, wait=process.wait, close=process.close, join=process.join)
            case ServedCode() as served:
                model = ServedModel(served, code.gives)
                return Loaded(starter=model, close=model.close)
        raise TypeError(f"{code.kind.noun} cannot be loaded")

    def _process(
        self, code: Code, kind: ArchiveCode | RowsFunctionCode, startup_s: float, limit_s: float
    ) -> tuple[HandlerSpec, TemporaryDirectory[str] | None]:
        """What the process of a TorchServe handler runs, and what deletes its folder."""
        if isinstance(kind, ArchiveCode):
            root = self._project.root
            kept_in = root if (root / "build.json").is_file() else None  # an archive of ours, unpacked
            folder, owned = archives.unpacked(kind.archive, kept_in)
            source, handler = kind.archive.name, archives.handler_of(kind.archive) or ""
        else:
            folder, owned = functions.folder_of(kind.file)
            source, handler = kind.file.name, f"{kind.file.stem}:{kind.function}"
        # Here and below: it imports torch, which takes two seconds, and a workflow of functions needs none.
        from torchserve_dag.runtime.compute.placement import find_device  # noqa: PLC0415

        device = find_device(self._device or "auto", self._gpu)
        gpu = device.index if device.type == "cuda" else None
        spec = HandlerSpec(
            code.name, source, folder, handler, code.gives, code.yields, gpu, code.batch, startup_s, limit_s
        )
        return spec, owned

    def _handler(self, file: Source[HandlerFile], device: str, batch: int) -> LoadedHandler:
        key = (file.path, device)
        if key not in self._handlers:
            load = partial(
                load_handler, self._project, file, device=device, gpu=self._gpu, batch=batch, lanes=self._lanes
            )
            self._handlers[key] = self._reuse(file, device, load) if self._reuse else load()
        return self._handlers[key]


def load_handler(
    project: Project,
    file: Source[HandlerFile],
    *,
    device: str | None = None,
    gpu: int | None = None,
    batch: int | None = None,
    lanes: int = 1,
) -> LoadedHandler:
    """A project's handler, loaded and warm. `device` and `batch` override those of its file; `lanes`: see Placement.

    Raises CheckError for a file that is wrong, ValueError for a device that is not there.
    """
    from torchserve_dag.runtime.compute.placement import Placement, find_device  # noqa: PLC0415

    share_cores(lanes)
    run = file.value.run
    kind = project.handler_class(file)
    settings = project.settings(file, kind)
    link_weights(project, file)
    device_here = find_device(device or run.device, gpu)
    placement = Placement(device_here, run.precision, run.channels_last, run.runtime, lanes)
    handler = kind()
    with project.modules.by_bare_names():  # as the training code called them: a pickle names its classes so
        handler.load(project.weights, settings, placement)
    check = as_declared(types_of(kind)[1], file.value.name, also=(Failure,))
    if isinstance(handler, ContinuousHandler):
        model = ContinuousModel(file.value.name, handler, str(device_here), check)
        if handler.warms_up:
            model.warm_up()
        return model
    stages = Stages(file.value.name, handler, placement, run.micro_batch, file.value.serve.timeout_s, check)
    if handler.warms_up:
        stages.warm_up(batch or run.batch)
    return stages


def decoder(kind: Any, max_pixels: int) -> Runner:
    """The runner that decodes requests to messages. A message, which a program sends, passes unchanged."""

    def decode(request: Any) -> Any:
        if isinstance(request, bytes | bytearray | memoryview):
            request = Body(bytes(request))
        return read(kind, request, max_pixels=max_pixels) if isinstance(request, Body | Parts) else request

    return function_runner("decode", decode)


def close(loaded: Collection[Loaded]) -> None:
    """Close all of them, at the same time."""
    for one in loaded:
        one.close()
    for one in loaded:
        one.join()


def _do_nothing() -> None:
    """Whoever reuses the handler closes it."""


def _by_name(function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    return function(**values)
