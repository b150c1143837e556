"""What `language.py` measures: a server, its clients, and the engine's bare loop, each in processes of their own."""

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from loadtests.language_bare import BARE
from loadtests.language_client import Load, Measured, Place
from loadtests.language_server import LanguageServer, serving, weights_for
from torchserve_dag.runtime.compute.cores import cores
from torchserve_dag.runtime.compute.placement import Placement, find_device
from torchserve_dag.runtime.models.language.settings import LanguageSettings
from torchserve_dag.server import processes

ROOT = Path(__file__).resolve().parent.parent
ROOM, CONTEXT, PREFILL = 18, 2048, 128
IN_FLIGHT = 256 * CONTEXT
"""The limit of tokens: no request is refused."""
ANSWER_S = 600.0
"""The longest wait for an answer, and for a program that loads a model."""


def show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 (for a person)


class Program:
    """A program that takes loads: `language_client.py` or `language_bare.py`."""

    def __init__(self, name: str, *words: str) -> None:
        command = [sys.executable, str(ROOT / "loadtests" / name), *words]
        self._name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 (our own)

    def __enter__(self) -> Program:
        try:
            self._line(ANSWER_S)
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    def measure(self, load: Load) -> Measured:
        if self._process.stdin is None:
            raise SystemExit(f"{self._name} has no input")
        self._process.stdin.write(json.dumps(asdict(load)).encode() + b"\n")
        self._process.stdin.flush()
        return Measured(**json.loads(self._line(load.warm_up_s + load.seconds + ANSWER_S)))

    def _line(self, limit_s: float) -> bytes:
        out = self._process.stdout
        line = out.readline() if out and select.select([out], [], [], limit_s)[0] else b""
        if not line:
            raise SystemExit(f"{self._name} ended, or gave no answer within {limit_s:g} s")
        return line


@dataclass(frozen=True)
class Arranged:
    """What is measured: a server, the clients, and the bare loop, if the engine has one here."""

    engine: str
    server: LanguageServer
    client: Program
    bare: Program | Place | None
    """Its loop in a program, or its own server."""

    @property
    def places(self) -> dict[str, Place | None]:
        """By their names; None for the bare loop."""
        found: dict[str, Place | None] = {}
        if self.bare:
            found["bare loop"] = self.bare if isinstance(self.bare, Place) else None
        return found | {place.name: place for place in (self.server.at_worker(), self.server.at_door())}

    def cpu_s(self, place: Place | None) -> float:
        """Seconds of CPU so far, of the bare loop's process, or of the server's processes."""
        if place is None or isinstance(self.bare, Place):
            pid = self.bare.pid if isinstance(self.bare, Program) else 0
            those = [psutil.Process(pid)] if pid else []
        else:
            those = processes.family(self.server.state)
        return sum(_cpu_s(process) for process in those)

    def measure(self, load: Load) -> Measured:
        bare = self.bare if isinstance(self.bare, Program) and not load.place else None
        return (bare or self.client).measure(load)


@contextmanager
def arranged(options: argparse.Namespace, *, bare: bool) -> Iterator[Arranged]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        weights = weights_for(options.engine, options.model, folder)
        settings = {
            "engine": options.engine,
            "room": options.room,
            "context": CONTEXT,
            "prefill_tokens": options.prefill_tokens,
            "tokens_in_flight": IN_FLIGHT,
            **json.loads(options.settings),
        }
        setup = {name: settings[name] for name in ("engine", "room", "prefill_tokens", "context")}
        setup |= {"weights": str(weights), "threads": cores()}
        loop: Program | Place | None = None
        if bare and options.engine in BARE:
            loop = stack.enter_context(Program("language_bare.py", json.dumps(setup)))
        if bare and options.engine == "vllm":
            loop = stack.enter_context(vllms_own_server(weights, settings))
        (folder / "project").mkdir()
        server = stack.enter_context(serving(folder / "project", weights, settings))
        yield Arranged(options.engine, server, stack.enter_context(Program("language_client.py")), loop)


@contextmanager
def vllms_own_server(weights: Path, settings: dict[str, Any]) -> Iterator[Place]:
    """VLLM's server as the engine starts it, without the engine."""
    # Not imported by name: what is measured may be a version without it.
    arguments = import_module("torchserve_dag.runtime.models.language.vllm_arguments")
    server = import_module("torchserve_dag.runtime.models.language.vllm_server")
    known = LanguageSettings(**{"model": weights.name, **settings})
    started = server.VllmServer("bare", arguments.command(weights.parent, known, Placement(find_device("auto"))))
    try:
        fields = {"model": weights.name, "stream": True, "stream_options": {"include_usage": True}}
        yield Place("bare loop", f"unix:{started.wait()}", "/v1/chat/completions", fields=fields)
    finally:
        started.close()


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
