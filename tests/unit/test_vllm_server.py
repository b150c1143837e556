"""How vLLM is started, watched and ended, with a small server in its place; tests/engines has the real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from torchserve_dag import LanguageSettings, Placement
from torchserve_dag.runtime.models.language.engines import load_engine
from torchserve_dag.runtime.models.language.vllm import environment as vllm_environment
from torchserve_dag.runtime.models.language.vllm.arguments import Command, command
from torchserve_dag.runtime.models.language.vllm.engine import counters
from torchserve_dag.runtime.models.language.vllm.server import VllmServer, reason

CPU = Placement(torch.device("cpu"))
SERVER = """
    import http.server, os, socketserver, subprocess, sys

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def address_string(self):
            return "worker"

    class Server(socketserver.UnixStreamServer):
        def get_request(self):
            return super().get_request()[0], ("worker", 0)

    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("started with", *sys.argv[1:], flush=True)
    Server(sys.argv[sys.argv.index("--uds") + 1], Answers).serve_forever()
"""
"""A server with another process beside it, which would live on if nobody ended it."""


def serving(code: str = SERVER) -> Command:
    return Command([sys.executable, "-c", textwrap.dedent(code)], dict(os.environ))


def until(what: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.01)


def runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def below(pid: int | None) -> list[psutil.Process]:
    assert pid
    group = psutil.Process(pid)
    return [group, *group.children(recursive=True)]


def test_closed_nothing_of_it_is_left() -> None:
    server = VllmServer("tiny", serving())
    socket, there = server.wait(), below(server.pid)
    assert len(there) == 3
    server.close()

    until(lambda: not any(runs(process) for process in there))
    assert not socket.parent.exists()


@pytest.mark.parametrize("killed", [0, 1], ids=["the program between", "the server"])
def test_killed_it_is_started_again_and_nothing_is_left_of_the_first(killed: int) -> None:
    server = VllmServer("tiny", serving())
    try:
        first, there = server.wait(), below(server.pid)
        there[killed].kill()
        until(lambda: server.socket not in {None, first})

        assert not any(runs(process) for process in there)
        assert not first.exists()
    finally:
        server.close()


def test_a_worker_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    """By SIGKILL, so that it can do nothing itself."""
    script = f"""
        import pathlib, time
        from tests.unit.test_vllm_server import VllmServer, serving
        socket = VllmServer("tiny", serving()).wait()
        pathlib.Path({str(tmp_path / "new")!r}).write_text(str(socket))
        pathlib.Path({str(tmp_path / "new")!r}).rename({str(tmp_path / "socket")!r})
        time.sleep(600)
    """
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=root) as worker:
        until((tmp_path / "socket").exists)
        there = psutil.Process(worker.pid).children(recursive=True)
        worker.send_signal(signal.SIGKILL)

    assert len(there) == 3
    until(lambda: not any(runs(process) for process in there))
    assert not Path((tmp_path / "socket").read_text()).parent.exists()


def test_what_ends_before_it_serves_is_not_started_again(capfd: pytest.CaptureFixture[str]) -> None:
    server = VllmServer("tiny", serving("raise OSError('no weights there')"))

    with pytest.raises(ValueError, match="vllm does not serve tiny: OSError: no weights there"):
        server.wait()
    assert "tiny vllm: Traceback" in capfd.readouterr().err


def test_the_reason_is_the_last_exception_that_does_not_refer_to_another() -> None:
    why = ""
    for line in (
        "(APIServer) WARNING 11-27 [system_utils.py] This can cause errors like `OSError: [Errno 24] Too many open files`.",
        "(Worker) ERROR 11-27 [multiproc_executor.py:953] RuntimeError: there is no such kernel",
        "(EngineCore) ERROR 11-27 Exception: WorkerProc initialization failed. See stack trace for root cause.",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ):
        why = reason(line, why)

    assert why == "RuntimeError: there is no such kernel"


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights, and an environment with nothing but its Python."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setenv(vllm_environment.VARIABLE, str(tmp_path))
    for model, trained in (("llama", 2048), ("long", 131072)):
        (tmp_path / model).mkdir()
        (tmp_path / model / "config.json").write_text(json.dumps({"max_position_embeddings": trained}))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"r": 12}')
    (tmp_path / "small.gguf").touch()
    return tmp_path


def words(weights: Path, **settings: Any) -> str:
    return " ".join(command(weights, LanguageSettings(**({"model": "llama", "engine": "vllm"} | settings)), CPU).words)


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"room": 8}, "--max-num-seqs 8"),
        ({"room": 8, "prefill_tokens": 256}, "--max-num-batched-tokens 264"),
        ({}, "--max-model-len 2048"),
        ({"model": "long"}, "--max-model-len 8192"),
        ({"context": 100}, "--max-model-len 100"),
        ({"cache_gb": 0.5}, "--kv-cache-memory-bytes 500000000"),
        ({"prefix_cache": False}, "--no-enable-prefix-caching"),
        ({"exact": True}, "--dtype float32"),
        ({"adapters": {"a": "lora"}}, "--max-lora-rank 16"),
        ({"draft": "long", "room": 1}, "--max-num-batched-tokens 133"),
        ({"options": {"tool_call_parser": "hermes"}}, "--enable-auto-tool-choice"),
        ({"options": {"tensor_parallel_size": 2, "enforce_eager": True}}, "--tensor-parallel-size 2 --enforce-eager"),
        ({"options": {"block_size": 64}}, "--block-size 64"),
        ({"options": {"speculative_config": {"method": "ngram"}}}, '--speculative-config {"method": "ngram"}'),
    ],
    ids=str,
)
def test_a_setting_is_an_argument_of_vllm(weights: Path, settings: dict[str, Any], argument: str) -> None:
    assert argument in words(weights, **settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"options": {"max_num_seqs": 3}}, "options: max_num_seqs is room in settings"),
        ({"options": {"uds": "/tmp/x"}}, "options: uds is set by the engine"),
        ({"model": "small.gguf"}, "model: vllm reads no GGUF"),
        ({"model": "lama"}, "model: there is no lama in"),
        ({"draft": "lama"}, "draft: there is no lama in"),
        ({"adapters": {"a": "llama"}}, "it is no LoRA adapter"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(weights: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        words(weights, **settings)


def test_the_processes_of_a_layer_share_the_threads(weights: Path) -> None:
    settings = LanguageSettings("llama", engine="vllm", threads=6, options={"tensor_parallel_size": 2})

    assert command(weights, settings, CPU).environment["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(("seen", "given"), [(None, "1,2"), ("4,5,6,7", "5,6")])
def test_it_sees_the_gpus_of_its_handler_and_no_other(
    weights: Path, monkeypatch: pytest.MonkeyPatch, seen: str | None, given: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    settings = LanguageSettings("llama", engine="vllm", options={"tensor_parallel_size": 2})
    environment = command(weights, settings, Placement(torch.device("cuda", 1))).environment

    assert environment["CUDA_VISIBLE_DEVICES"] == given
    assert "OMP_NUM_THREADS" not in environment.keys() - os.environ.keys()


def test_without_its_environment_the_engine_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vllm_environment.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "llama").mkdir()

    with pytest.raises(
        ImportError, match=r"needs an environment of its own, at .*: run torchserve-dag add engine vllm"
    ):
        load_engine(tmp_path, LanguageSettings("llama", engine="vllm"), CPU)


def test_an_environment_that_is_named_and_is_none_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(vllm_environment.VARIABLE, str(tmp_path))

    with pytest.raises(ImportError, match=rf"{vllm_environment.VARIABLE} names .*: it has no bin/python"):
        vllm_environment.interpreter("cpu")


def test_a_page_of_metrics_is_read() -> None:
    page = """
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="a b"} 3.0
vllm:num_requests_waiting{engine="0",model_name="a b"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="a b",reason="capacity"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="a b"} 0.25
vllm:iteration_tokens_total_sum{engine="0",model_name="a b"} 90.0
"""
    found = counters(page)

    assert (found.load.running, found.load.waiting, found.load.cache_usage, found.tokens) == (3, 2, 0.25, 90)
