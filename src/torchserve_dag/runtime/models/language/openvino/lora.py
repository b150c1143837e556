"""LoRA adapters for the engine `openvino`: read in peft's format, each for a pipeline of its own.

OpenVINO GenAI 2026.4.1 ignores the adapters of a request that is added to a running pipeline, and computes without a
word what is left of an adapter that does not fit. So an adapter is a part of its pipeline's model, and what cannot be
a part of it is refused here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torchserve_dag.runtime.models.language.settings import LanguageSettings

PREFIX = "base_model.model."
"""What peft writes before the name of each tensor."""
TENSOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight")
UNLIKE = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
"""Keys of `adapter_config.json` that change more than low-rank matrices of one scale do."""


def read_adapter(folder: Path, settings: LanguageSettings, name: str) -> Any:
    """OpenVINO's configuration of the adapter of this name. Raises ValueError."""
    import openvino_genai  # noqa: PLC0415 (only this engine needs it)

    path = settings.adapters[name]
    file, config_file = folder / path / "adapter_model.safetensors", folder / path / "adapter_config.json"
    for each in (file, config_file):
        if not each.is_file():
            raise ValueError(f"there is no {path}/{each.name} in {folder}, for the adapter {name}")
    config = json.loads(config_file.read_text("utf-8"))
    unlike = [key for key in UNLIKE if config.get(key)]
    if unlike:
        raise ValueError(f"the adapter {name} has {unlike[0]}, which the engine openvino cannot apply")
    _check_fits(name, file, folder / settings.model)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    # As constants beside the weights: fused into them, they would have to be in 16 or 32 bits.
    mode = openvino_genai.AdapterConfig.Mode.MODE_STATIC
    return openvino_genai.AdapterConfig(openvino_genai.Adapter(file), scale, mode)


def _check_fits(name: str, file: Path, model: Path) -> None:
    """Raises ValueError unless each tensor of the file belongs to a layer of the model."""
    import openvino  # noqa: PLC0415

    if not model.is_dir():
        raise ValueError(f"the engine openvino applies adapters to OpenVINO IR only, and {model.name} is none")
    nodes = openvino.Core().read_model(model / "openvino_model.xml").get_ops()
    layers = "\n".join(node.get_friendly_name() for node in nodes)
    for tensor in _tensors(file):
        found = TENSOR.fullmatch(tensor)
        if found is None or not (found[1] in layers or found[1].replace(".", "_") in layers):
            raise ValueError(f"the adapter {name} does not fit the model: it has no place for {tensor}")


def _tensors(file: Path) -> list[str]:
    """The names in a file of safetensors: the length of a header in 8 bytes, and the header in JSON."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return [name for name in header if name != "__metadata__"]
