"""A language model behind the direct host, its front door and `/v1`: for the programs that measure it and attack it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loadtests import small_project  # noqa: E402 (this file may be imported by a program that was run by its path)
from loadtests.language_client import Place  # noqa: E402
from torchserve_dag.front_door.door import Door  # noqa: E402
from torchserve_dag.runtime.project.weight_files import sha256  # noqa: E402
from torchserve_dag.server import processes  # noqa: E402
from torchserve_dag.server.state import State  # noqa: E402
from torchserve_dag.stack import connect  # noqa: E402
from torchserve_dag.stack.worker_process import WorkerProcess  # noqa: E402

NAME = "text_generation"
GGUF = frozenset({"openvino", "llama.cpp"})
"""Engines that read it; the others read a folder of safetensors."""
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = ("smollm2", "tiny")
CARD = {"does": "Writes.", "input": "A chat.", "output": "Text.", "limits": "It is a load test's."}
LIMITS = "limits: {requests_per_second: 100000}\n"


@dataclass(frozen=True)
class LanguageServer:
    """A running server with one language model."""

    root: Path
    state: State
    port: int
    token: str
    """With no limit that a load test would reach."""

    @property
    def certificate(self) -> str:
        record = Door(self.state).record()
        if record is None:
            raise SystemExit("the front door has ended")
        return record.certificate

    def worker(self) -> WorkerProcess:
        """Its only worker. It may have ended."""
        return WorkerProcess.all(self.state)[-1]

    def at_worker(self) -> Place:
        """The worker's own socket, as Envoy calls it."""
        socket = self.state.direct / "workers" / f"{self.worker().record.id}.sock"
        return Place("worker", f"unix:{socket}", f"/predictions/{NAME}", headers={"x-usage": "true"})

    def at_door(self, token: str | None = None) -> Place:
        """Through the front door and the gateway."""
        fields = {"model": NAME, "stream": True, "stream_options": {"include_usage": True}}
        headers = {"authorization": f"Bearer {token or self.token}"}
        path = "/v1/chat/completions"
        return Place("/v1", f"localhost:{self.port}", path, self.certificate, headers, fields)

    def memory_mb(self) -> dict[str, float]:
        """Resident memory of the worker, Envoy and the gateway, with the processes that these have started."""
        found = dict.fromkeys(("worker", "envoy", "gateway"), 0.0)
        for process in processes.family(self.state):
            try:
                words = " ".join(process.cmdline())
                size = process.memory_info().rss / 2**20
            except psutil.Error:
                continue
            names = {"worker": "direct/worker.py", "gateway": "torchserve_dag.gateway", "envoy": "envoy"}
            if name := next((name for name, word in names.items() if word in words), None):
                found[name] += size
        return found


@contextmanager
def serving(
    root: Path,
    weights: Path,
    settings: dict[str, Any],
    more: dict[str, str] | None = None,
    names: Sequence[str] = (),
    **serve: Any,
) -> Iterator[LanguageServer]:
    """Serve a model of `weights`, a file or folder, with these settings of `handlers/text_generation.py`. `more` are
    other files of the project, and `names` what is served of it, if not all. `serve` are settings of that name in the
    handler's YAML.
    """
    (root / "weights").mkdir(exist_ok=True)
    (root / "weights" / weights.name).symlink_to(weights.resolve(), target_is_directory=weights.is_dir())
    handlers = root / "handlers"
    handlers.mkdir()
    shutil.copy(ROOT / "handlers" / f"{NAME}.py", handlers)
    held = {"file": weights.name, "source": "a load test", "licence": "Apache-2.0", "sha256": sha256(weights)}
    file = {
        "name": NAME,
        "version": "1.0",
        "settings": {"model": weights.name, **settings},
        "serve": {"timeout_s": 600, "startup_timeout_s": 600, **serve},
        "card": {**CARD, "weights": [held]},
    }
    (handlers / f"{NAME}.yaml").write_text(json.dumps(file, indent=1))  # JSON is YAML
    small_project.make(root, {"front_door.yaml": LIMITS, **(more or {})}, names)
    try:
        small_project.tool(root, "up", "--free-ports", "--host", "direct")
        state = State(root)
        record = Door(state).record()
        if record is None:
            raise SystemExit("the front door has ended")
        port = int(connect.local_address(record.settings).rpartition(":")[2])
        yield LanguageServer(root, state, port, small_project.tool(root, "token", "new", "load").strip())
    finally:
        small_project.tool(root, "down")


def weights_for(engine: str, model: str, folder: Path) -> Path:
    """The weights of `smollm2`, of the small Llama (`tiny`), or of a path, in a form that the engine reads; what has
    to be made is made in `folder`.
    """
    if model not in MODELS:
        return Path(model).resolve()
    if model == "smollm2":
        file = ROOT / "weights" / SMOLLM2
        if not file.is_file():
            raise SystemExit(f"there is no {file}: run .venv/bin/python scripts/weights --language")
        return file if engine in GGUF else _unpacked(file, folder / "smollm2")
    from tests.tiny_llama import make_gguf, make_llama  # noqa: PLC0415 (it imports transformers)

    llama = make_llama(folder / "llama")
    return make_gguf(folder / "gguf", llama, half=True) if engine in GGUF else llama


def _unpacked(file: Path, folder: Path) -> Path:
    """A GGUF file as a folder of safetensors."""
    import transformers  # noqa: PLC0415 (takes seconds)

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    kinds: list[Any] = [transformers.AutoModelForCausalLM, transformers.AutoTokenizer]
    for kind in kinds:
        kind.from_pretrained(**where).save_pretrained(folder)
    return folder


def until(what: Callable[[], object], within_s: float) -> float | None:
    """Seconds until it is true; None if it is not within the limit."""
    began = time.monotonic()
    while not what():
        if time.monotonic() - began > within_s:
            return None
        time.sleep(0.01)
    return time.monotonic() - began
