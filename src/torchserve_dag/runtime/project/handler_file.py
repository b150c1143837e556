"""A handler's YAML file: its name and version, its settings, how it runs and is served, and its card."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal
from urllib.parse import urlsplit

from torchserve_dag.runtime.compute import Precision, Runtime
from torchserve_dag.runtime.data.photos import MAX_PIXELS, MOST_PIXELS
from torchserve_dag.runtime.messages import WrongFieldError

NAME = re.compile(r"[a-z][a-z0-9_]*\Z")
CODE = re.compile(r"[A-Za-z0-9_]+\.py\Z")
DEVICE = re.compile(r"(auto|cpu|cuda(:[0-9]+)?)\Z")
VERSION = re.compile(r"[0-9]+(\.[0-9]+)*\Z")
KEPT = re.compile(r"(/(.*/)?)?[A-Za-z0-9_-]+\.jsonl\Z")
DIGEST = re.compile(r"[0-9a-f]{64}\Z")

Mode = Literal["batched", "asynchronous"]
"""How requests reach a worker: in batches, whose answers are sent together, or each request by itself."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the weights of a model come from."""

    file: str
    """A file or a folder below the project's `weights/`."""
    source: str
    """The address, or the package and its version, that the weights were downloaded from."""
    licence: str
    """The licence of the weights."""
    sha256: str | None = None
    """The SHA-256 of the file; of a folder, the SHA-256 of its sorted `sha256sum` lines. `build` refuses weights
    without a SHA-256."""
    get: str = ""
    """The command that downloads the weights."""
    fetch_from: str = ""
    """Where a worker fetches the weights: an absolute path, or an address like `https://…`, `s3://…` or `hf://…`. Then
    the archive holds this address and the SHA-256 in place of the weights."""

    def __post_init__(self) -> None:
        if not self.fetch_from:
            return
        if "://" not in self.fetch_from and not self.fetch_from.startswith("/"):
            what = f'"{self.fetch_from}" is neither an absolute path nor an address like https://…'
            raise WrongFieldError(what, "fetch_from")
        if "@" in urlsplit(self.fetch_from).netloc:
            what = "an address in a file has no password; give it to the workers in their environment"
            raise WrongFieldError(what, "fetch_from")
        if self.sha256 and not DIGEST.match(self.sha256):
            raise WrongFieldError("a sha256 has 64 digits, of 0 to 9 and a to f", "sha256")


@dataclass(frozen=True, slots=True)
class Card:
    """What a person must know of a model before relying on it."""

    does: str
    """What the model is for, in a sentence."""
    input: str
    """What a client sends."""
    output: str
    """What a client gets back."""
    limits: str
    """Where the model is known to fail, and what it must not be used for."""
    weights: list[Weights]
    """The files that the model loads, with their sources; an empty list for a model without weights."""

    def __post_init__(self) -> None:
        for name in ("does", "input", "output", "limits"):
            if not getattr(self, name).strip():
                raise WrongFieldError("it is empty; write a sentence", name)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A batch is cut into micro-batches, whose stages overlap: while `infer` runs for a micro-batch, `preprocess` runs
    for the next.
    """

    size: int
    """Items in a micro-batch."""
    preprocess: int = 1
    """Threads that run `preprocess`."""
    infer: int = 1
    """Threads that run `infer`."""
    postprocess: int = 1
    """Threads that run `postprocess`."""

    def __post_init__(self) -> None:
        if min(self.size, self.preprocess, self.infer, self.postprocess) < 1:
            raise ValueError("a micro-batch's numbers are at least 1")


@dataclass(frozen=True, slots=True)
class Run:
    """How a handler computes, in any process."""

    batch: int = 1
    """The largest batch that `infer` gets. On a CPU, photos run fastest at 1: one photo on each core."""
    micro_batch: MicroBatch | None = None
    """Cut each batch into micro-batches whose stages overlap."""
    device: str = "auto"
    """`auto` (a GPU where there is one, else the CPU), `cpu`, or `cuda:N`."""
    precision: Precision = "float32"
    """The number format of the model's weights and arithmetic."""
    channels_last: bool = False
    """Store images with the channels as the last dimension, which makes convolutions faster on a CPU."""
    runtime: Runtime = "torch"
    """What computes the model. Where `compiled` or `openvino` cannot compute it, torch does."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError("batch is at least 1")
        check_device(self.device)


@dataclass(frozen=True, slots=True)
class KeepFile:
    """Requests and their answers in a file, a line of JSON for each. Without this key they are kept nowhere."""

    file: str = "conversations.jsonl"
    """A name in the project's `logs/`, or an absolute path; it ends with `.jsonl`. Workflows may share a file. Only its
    owner can read it."""
    megabytes: int = 100
    """How large the file may become, together with its older half in `NAME.1.jsonl`. What is older still is deleted."""
    redact: str | None = None
    """A function of the Python file beside the YAML, `def redact(text: str) -> str`. Each text of a message or of an
    answer is kept as the function gives it. If the function raises, the request is not kept."""

    def __post_init__(self) -> None:
        if not KEPT.match(self.file):
            what = f'"{self.file}" is not a name or an absolute path that ends with .jsonl, like conversations.jsonl'
            raise WrongFieldError(what, "file")
        if self.megabytes < 1:
            raise WrongFieldError("megabytes is at least 1", "megabytes")


@dataclass(frozen=True, slots=True)
class Serve:
    """How TorchServe serves an archive: what `build` writes into its `model-config.yaml`."""

    workers: int = 1
    """Worker processes, each with a copy of the weights. One process already uses every core."""
    batch: int = 64
    """The largest batch of requests that TorchServe sends to a worker."""
    queue: int = 200
    """Requests that may wait for a worker, beside the `batch` that it has. One more is answered 503 at once. A short
    queue bounds the waiting time under overload."""
    delay_ms: int = 1
    """How long TorchServe waits for a batch to fill, in milliseconds. At least 1, because TorchServe reads 0 as its
    default of 100 ms."""
    mode: Mode | None = None
    """`batched` or `asynchronous`. Without it, `asynchronous` where the answer streams, else `batched`. In batched mode
    the chunks of a streamed answer leave together."""
    timeout_s: int = 30
    """The longest time that a request may take in the worker, in seconds. Then it is answered 504."""
    startup_timeout_s: int = 300
    """The longest time that a worker may take to load the model, in seconds."""
    max_inside: int = 1_000
    """Requests in progress that a worker accepts. One more is answered 503 at once."""
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest photo that a worker decodes, at most 178,956,970. A larger photo is answered 413. A decoded
    pixel takes 4 bytes of memory."""
    pixels_inside: int = 400_000_000
    """Pixels of the photos of all requests in progress in a worker. While there are more, further requests wait, and
    their photos are not decoded."""
    score: str | None = None
    """A field of the answer that holds a number, how good the answer is, for experiments. Dots lead into nested fields:
    `best.score`."""
    keep: KeepFile | None = None
    """Keep requests and their answers in a file."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name not in {"mode", "score", "keep"} and getattr(self, each.name) < 1:
                raise WrongFieldError(f"{each.name} is at least 1", each.name)
        if self.max_pixels > MOST_PIXELS:
            what = f"max_pixels is at most {MOST_PIXELS:,}: Pillow decodes no larger photo"
            raise WrongFieldError(what, "max_pixels")


def check_device(device: str) -> None:
    """Raises WrongFieldError for what is no device on any machine."""
    if not DEVICE.match(device):
        raise WrongFieldError(f'"{device}" is not a device; write auto, cpu or cuda:N', "device")


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
    """The model's name on the server: lower-case letters, digits and underscores, a letter first."""
    version: str
    """Numbers with dots, in quotes: `"1.0"`."""
    card: Card
    """What a person must know of the model before relying on it."""
    code: str = ""
    """The Python file in `handlers/` that holds the class. Without it, `NAME.py`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Values for the fields of the class's `Settings`."""
    requirements: list[str] = field(default_factory=list)
    """The installed packages that the code imports, with their versions, as for pip: `timm>=1.0,<2`. `check`, `build`
    and every worker refuse others; `build.json` names the versions that were there."""
    run: Run = field(default_factory=Run)
    """How the handler computes."""
    serve: Serve = field(default_factory=Serve)
    """How TorchServe serves the handler as a model of its own."""

    def __post_init__(self) -> None:
        check_identity(self.name, self.version, self.code)

    @property
    def code_file(self) -> str:
        return self.code or f"{self.name}.py"
