"""The engines by their names in a handler's YAML. Each module is imported only where its engine is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torchserve_dag.runtime.models.language.engine import LanguageEngine, PromptReader
from torchserve_dag.runtime.models.language.process.engine import EngineProcess
from torchserve_dag.runtime.models.language.process.messages import EngineSpec
from torchserve_dag.runtime.models.language.settings import EngineName, LanguageSettings
from torchserve_dag.runtime.models.language.vllm import environment as vllm_environment

if TYPE_CHECKING:  # it imports torch
    from torchserve_dag.runtime.compute.placement import Placement

LoadPrompts = Callable[[Path, LanguageSettings], PromptReader]
"""`load_prompts` of the module of an engine's tokenizer side. Raises ValueError."""
LoadEngine = Callable[[Path, LanguageSettings, "Placement"], LanguageEngine]
"""`load` of an adapter's module: the folder of the weights, the settings, where to compute. Raises ValueError for
settings, or files, that do not fit."""


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """An engine that `engine:` may name."""

    module: str
    """The module of this folder with its `load`."""
    package: str | None
    """The top-level module of the package that it needs; None where its own module looks for what it needs."""
    install: str
    """What to run where that is missing."""
    prompts: str | None = None
    """The module of its tokenizer's side, if it steps in Python's process: it has one of its own then, and so holds up
    no thread of the worker."""
    on_torch: bool = True
    """Whether its `load` wants a placement, which torch's device is part of; else it is loaded without one."""


ENGINES = {
    "openvino": EngineEntry(
        "openvino.engine",
        "openvino_genai",
        "pip install 'torchserve-dag[language]'",
        "openvino.prompts",
        on_torch=False,
    ),
    "transformers": EngineEntry(
        "transformers.engine", "transformers", "pip install 'torchserve-dag[serve]'", "transformers.prompts"
    ),
    "llama.cpp": EngineEntry("llama_cpp.engine", "xllamacpp", "pip install xllamacpp==2026.10.11549"),
    "remote": EngineEntry("remote.engine", "httpx", "pip install 'httpx>=0.27,<1'"),
    "deepspeed": EngineEntry(
        "ranks.deepspeed", "deepspeed", "pip install --no-build-isolation 'torchserve-dag[deepspeed]'"
    ),
    "onnxruntime": EngineEntry("onnxruntime.engine", "onnxruntime_genai", "pip install 'torchserve-dag[onnxruntime]'"),
    "pipeline": EngineEntry("ranks.pipeline", "transformers", "pip install 'torchserve-dag[serve]'"),
    "vllm": EngineEntry("vllm.engine", None, vllm_environment.INSTALL),
}


def engine_for(settings: LanguageSettings, placement: Placement) -> EngineName:
    """The engine that the settings name; for `auto` the default of the device."""
    if settings.engine != "auto":
        return settings.engine
    return "vllm" if placement.device.type == "cuda" else "openvino"


def load_engine(folder: Path, settings: LanguageSettings, placement: Placement) -> LanguageEngine:
    """The engine that the settings name, with its model loaded, where it computes best: in a process of its own, if it
    would hold up the threads of this one. Raises ValueError, ImportError.
    """
    entry = _entry(settings)
    if entry.prompts is None:
        return load_engine_here(folder, settings, placement)
    load_prompts: LoadPrompts = import_module(f"{__package__}.{entry.prompts}").load_prompts
    folder = folder.absolute()
    spec = EngineSpec(f"{__package__}.{entry.module}", folder, settings, placement if entry.on_torch else None)
    return EngineProcess(spec, lambda: load_prompts(folder, settings))


def load_engine_here(folder: Path, settings: LanguageSettings, placement: Placement) -> LanguageEngine:
    """The engine in this process, whichever it is. Raises ValueError, ImportError."""
    load: LoadEngine = import_module(f"{__package__}.{_entry(settings).module}").load
    return load(folder, settings, placement)


def _entry(settings: LanguageSettings) -> EngineEntry:
    """Raises ImportError where the engine's package is missing."""
    name = settings.engine
    entry = ENGINES[name]
    if entry.package and not find_spec(entry.package):
        raise ImportError(f"the engine {name} needs the package {entry.package}: run {entry.install}")
    return entry
