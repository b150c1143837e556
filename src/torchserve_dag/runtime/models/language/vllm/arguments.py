"""The settings of a language model as vLLM's own arguments and environment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchserve_dag.runtime.models.language.settings import LanguageSettings
from torchserve_dag.runtime.models.language.vllm.environment import interpreter

if TYPE_CHECKING:  # it imports torch
    from torchserve_dag.runtime.compute.placement import Placement

MODULE = "vllm.entrypoints.openai.api_server"
"""The server as a module: the command `vllm serve` does not run on a CPU."""
OURS = {
    "model": "model",
    "max_num_seqs": "room",
    "max_model_len": "context",
    "max_num_batched_tokens": "prefill_tokens",
    "kv_cache_memory_bytes": "cache_gb",
    "enable_prefix_caching": "prefix_cache",
    "chat_template": "chat_template",
    "enable_lora": "adapters",
    "lora_modules": "adapters",
}
"""Arguments of vLLM's that a setting here stands for."""
NOT_FREE = {"uds", "host", "port", "api_key", "root_path", "ssl_keyfile", "ssl_certfile", "served_model_name"}
"""Arguments that say where, and for whom, the server listens: it has a private socket, and one client."""
LARGEST_CONTEXT = 8192
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks of LoRA adapters that vLLM has room for."""
CPU_BLOCK = 32
"""Tokens of a block of the cache on a CPU: a shared beginning of fewer is computed again. vLLM's default is 128."""


@dataclass(frozen=True, slots=True)
class Command:
    """How a server is started; its socket is still to be named."""

    words: list[str]
    environment: dict[str, str]


def command(folder: Path, settings: LanguageSettings, placement: Placement) -> Command:
    """The command that serves the model below `folder`. Raises ValueError for settings that do not fit, ImportError
    where vLLM is not installed.
    """
    _check_options(settings.options)
    device = placement.device.type
    python = interpreter(device)
    model = _below(folder, settings.model, "model")
    if model.suffix == ".gguf":
        raise ValueError(f"model: vllm reads no GGUF; name a folder with safetensors, not {settings.model}")
    options = {**_defaults(model, settings, device), **dict(_folders(folder, settings)), **settings.options}
    if settings.draft:
        options["speculative_config"] = {
            "method": "draft_model",
            "model": str(_below(folder, settings.draft, "draft")),
            "num_speculative_tokens": settings.draft_tokens,
        }
    words = [str(python), "-m", MODULE, "--model", str(model), "--served-model-name", settings.model, *_words(options)]
    return Command(words, _environment(python, settings, placement))


def tensor_parallel(settings: LanguageSettings) -> int:
    """How many processes compute a layer together."""
    return int(settings.options.get("tensor_parallel_size", 1))


def _check_options(options: Mapping[str, Any]) -> None:
    for name in options:
        if name in OURS:
            raise ValueError(f"options: {name} is {OURS[name]} in settings: set it there")
        if name in NOT_FREE:
            raise ValueError(f"options: {name} is set by the engine: leave it out")


def _below(folder: Path, name: str, setting: str) -> Path:
    path = (folder / name).absolute()  # it is read in another working directory
    if not path.exists():
        raise ValueError(f"{setting}: there is no {name} in {folder}")
    return path


def _defaults(model: Path, settings: LanguageSettings, device: str) -> dict[str, Any]:
    speculates = settings.options.get("speculative_config") or {}
    tokens = 1 + (settings.draft_tokens if settings.draft else speculates.get("num_speculative_tokens", 0))
    options: dict[str, Any] = {
        "max_num_seqs": settings.room,
        "max_num_batched_tokens": settings.prefill_tokens + settings.room * tokens,
        "max_model_len": _context(model, settings),
        "enable_prefix_caching": settings.prefix_cache,
        "kv_cache_memory_bytes": int(settings.cache_gb * 1e9),
        "enable_prompt_tokens_details": True,
        "disable_uvicorn_access_log": True,
    }
    if settings.exact:
        options["dtype"] = "float32"
    if device == "cpu":
        options["block_size"] = CPU_BLOCK
    if settings.options.get("tool_call_parser"):
        options |= {"enable_auto_tool_choice": True, "tool_strict_level": "parameter"}  # arguments fit their schema
    return options


def _context(model: Path, settings: LanguageSettings) -> int | None:
    """The limit of a prompt and its answer. None if the model does not say what it was trained with."""
    if settings.context:
        return settings.context
    trained = config(model).get("max_position_embeddings")
    return min(trained, LARGEST_CONTEXT) if isinstance(trained, int) else None


def config(model: Path) -> Mapping[str, Any]:
    """What a model's `config.json` says of its text; empty where it has none. Raises ValueError if it is no JSON."""
    file = model / "config.json"
    data = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return {**data, **data.get("text_config", {})}


def _folders(folder: Path, settings: LanguageSettings) -> Iterator[tuple[str, Any]]:
    if settings.chat_template:
        yield "chat_template", str(_below(folder, settings.chat_template, "chat_template"))
    if settings.adapters:
        paths = {name: _below(folder, path, "adapters") for name, path in settings.adapters.items()}
        yield "enable_lora", True
        yield "lora_modules", [f"{name}={path}" for name, path in paths.items()]
        yield "max_loras", len(paths)
        largest = max(_rank(path) for path in paths.values())
        yield "max_lora_rank", next((rank for rank in RANKS if rank >= largest), RANKS[-1])


def _rank(adapter: Path) -> int:
    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"adapters: {adapter} has no adapter_config.json: it is no LoRA adapter")
    return int(json.loads(file.read_text("utf-8")).get("r", RANKS[0]))


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    """Options as arguments: `a_b: 1` is `--a-b 1`, true is `--a-b`, false is `--no-a-b`, a mapping is JSON."""
    for name, value in options.items():
        argument = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            yield f"--{argument}" if value else f"--no-{argument}"
        elif isinstance(value, list):
            yield from (f"--{argument}", *map(str, value))
        else:
            yield f"--{argument}"
            yield json.dumps(value) if isinstance(value, Mapping) else str(value)


def _environment(python: Path, settings: LanguageSettings, placement: Placement) -> dict[str, str]:
    """What vLLM is to know, and this process's environment: what is set there, and in no setting, holds."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",  # it would tell its makers
        "HF_HUB_OFFLINE": "1",  # the weights are there: nothing is fetched
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "PYTHONUNBUFFERED": "1",
    }
    folder = python.parent.parent
    if os.access(folder, os.W_OK):  # else what torch compiles for it is lost with its folder of temporary files
        defaults["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "torchinductor")
    given = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    if placement.device.type == "cuda":
        return {**defaults, **given, **_gpus(settings, placement.device.index or 0)}
    # Not bound to cores: several workers would be bound to the same ones.
    cores = settings.threads or len(os.sched_getaffinity(0))
    threads = {"OMP_NUM_THREADS": str(max(1, cores // tensor_parallel(settings)))}
    defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **threads}
    openmp = folder / "lib" / "libiomp5.so"
    if openmp.is_file():
        # Its idle threads sleep after 5 ms; those of GNU's OpenMP take the cores from everybody else.
        defaults |= {"LD_PRELOAD": str(openmp), "KMP_BLOCKTIME": "5"}
    return {**defaults, **given, **(threads if settings.threads else {})}


def _gpus(settings: LanguageSettings, first: int) -> dict[str, str]:
    """The GPU of the handler, among those that this process sees; with tensor parallel, also those after it."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = range(first, first + tensor_parallel(settings))
    if seen is None:
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, wanted))}
    return {"CUDA_VISIBLE_DEVICES": ",".join(seen.split(",")[first : first + len(wanted)])}
