"""A handler's YAML file: its name and version, its settings, how it runs and is served, and its card."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torchserve_dag.runtime.compute.placement import Precision, Runtime
from torchserve_dag.runtime.data.plain import WrongFieldError

NAME = re.compile(r"[a-z][a-z0-9_]*\Z")
CODE = re.compile(r"[A-Za-z0-9_]+\.py\Z")
VERSION = re.compile(r"[0-9]+(\.[0-9]+)*\Z")

Mode = Literal["batched", "asynchronous"]
"""How requests reach a worker: in batches that are answered together, or each by itself."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Where a model's weights came from. Nobody should have to ask why a model is running."""

    file: str
    """A file or a folder below the project's `weights/`."""
    source: str
    """The address, or the package and its version, that they were taken from."""
    licence: str
    sha256: str | None = None
    """Of the file; of a folder, that of its sorted `sha256sum` lines. `build` refuses weights without one."""
    get: str = ""
    """The command that brings them."""


@dataclass(frozen=True, slots=True)
class Card:
    """What a person must know before relying on a model."""

    does: str
    input: str
    output: str
    limits: str
    weights: list[Weights]

    def __post_init__(self) -> None:
        for name in ("does", "input", "output", "limits"):
            if not getattr(self, name).strip():
                raise WrongFieldError("it is empty; write a sentence", name)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Pieces of a batch whose stages overlap: while one is inferred, the next is being prepared."""

    size: int
    """Items a piece."""
    preprocess: int = 1
    """Threads for the stage; likewise below."""
    infer: int = 1
    postprocess: int = 1

    def __post_init__(self) -> None:
        if min(self.size, self.preprocess, self.infer, self.postprocess) < 1:
            raise ValueError("a micro-batch's numbers are at least 1")


@dataclass(frozen=True, slots=True)
class Run:
    """How a handler computes, in whatever process."""

    batch: int = 1
    """The most items that one `infer` takes. Photos on a CPU run fastest at 1, side by side on the cores."""
    micro_batch: MicroBatch | None = None
    device: str = "auto"
    precision: Precision = "float32"
    channels_last: bool = False
    runtime: Runtime = "torch"
    """Where it cannot compute the model, torch does."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError("batch is at least 1")


@dataclass(frozen=True, slots=True)
class Serve:
    """How TorchServe serves an archive: what `build` writes into its `model-config.yaml`."""

    workers: int = 1
    """Processes with the model. One uses every core: its lanes run side by side over one copy of the weights."""
    batch: int = 64
    """The most requests that one worker takes at a time."""
    batches: int = 1
    """How many such batches it may have at a time: with two, none waits for the last request of another."""
    queue: int = 200
    """Requests that may wait for a worker; one more is answered 503 at once. A small one keeps overload from making
    everybody late."""
    delay_ms: int = 1
    """How long TorchServe waits for a batch to fill. Zero would mean its default, 100 ms."""
    mode: Mode | None = None
    """`batched` unless the answer comes in pieces; in batched mode they leave as a whole. See docs/decisions."""
    timeout_s: int = 30
    """The longest that a request may take in the worker, before it is answered 504."""
    startup_timeout_s: int = 300
    max_inside: int = 1_000
    """Requests that may be inside one worker; one more is answered 503 at once."""
    score: str | None = None
    """A field of the answer that holds a number: how good the answer is, for experiments."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name not in {"mode", "score"} and getattr(self, each.name) < 1:
                raise WrongFieldError(f"{each.name} is at least 1", each.name)


def check_identity(name: str, version: str, code: str = "") -> None:
    """Raises ValueError: names and versions become file names, and the code is packed beside its YAML."""
    if not NAME.match(name):
        what = f'"{name}" is not a name; write lower-case letters, digits and underscores, a letter first'
        raise WrongFieldError(what, "name")
    if not VERSION.match(version):
        raise WrongFieldError(f'"{version}" is not a version; write numbers with dots, like "1.0"', "version")
    if code and not CODE.match(code):
        raise WrongFieldError(f'"{code}" is not a Python file in this folder; write its name, like {name}.py', "code")


@dataclass(frozen=True, slots=True)
class HandlerFile:
    """What `handlers/NAME.yaml` says."""

    name: str
    version: str
    card: Card
    code: str = ""
    """The Python file beside it; NAME.py unless it says otherwise."""
    settings: dict[str, Any] = field(default_factory=dict)
    run: Run = field(default_factory=Run)
    serve: Serve = field(default_factory=Serve)

    def __post_init__(self) -> None:
        check_identity(self.name, self.version, self.code)

    @property
    def code_file(self) -> str:
        return self.code or f"{self.name}.py"
