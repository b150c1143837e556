"""A hub model as ONNX for onnxruntime-genai: its cache of keys and values is an input and an output."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MODEL, CONFIG = "model.onnx", "genai_config.json"
PAST, PRESENT, KINDS = "past_key_values", "present", ("key", "value")
TRIED_TOKENS = 16
"""How many tokens the exported model writes before it is kept; they have to be the original's."""

Cache = list[tuple[Tensor, Tensor]]
"""Of each layer its keys and values, each [batch, heads, past, head]."""


def export(folder: Path, target: Path) -> None:
    """Write the model in `folder` into the new folder `target`, in float32.

    Raises ValueError if the exported model writes other tokens than the model, FileExistsError, OSError.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    if target.exists():
        raise FileExistsError(errno.EEXIST, "it exists already", str(target))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        _write_graph(model, new / MODEL)
        (new / CONFIG).write_text(json.dumps(genai_config(model), indent=2), "utf-8")
        for part in (model.config, model.generation_config, tokenizer):
            part.save_pretrained(new)
        _compare(model, new, tokenizer("The quick brown fox jumps over the lazy dog")["input_ids"])
        new.chmod(0o755)  # a temporary folder is its owner's alone
        new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


class _WithCache(nn.Module):
    """A model as a function of tensors only. Returns the last token's logits, and the cache with the new tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        self.train(mode=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Cache
    ) -> tuple[Tensor, Cache]:
        from transformers import DynamicCache  # noqa: PLC0415

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        out = self._model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def _write_graph(model: Any, file: Path) -> None:
    config = model.config
    layers = range(config.num_hidden_layers)
    batch, length, past = 2, 3, 5  # of the example: no two the same, and none 0 or 1, which are taken for constants
    shape = (batch, _cached_heads(config), past, _head_size(config))
    example = (
        torch.zeros(batch, length, dtype=torch.long),
        torch.ones(batch, past + length, dtype=torch.long),
        torch.arange(past, past + length).repeat(batch, 1),
        [(torch.zeros(shape), torch.zeros(shape)) for _ in layers],
    )
    cached = {0: "batch", 2: "past"}
    program = torch.onnx.export(
        _WithCache(model),
        example,
        dynamo=True,
        verbose=False,
        dynamic_shapes=(
            {0: "batch", 1: "length"},
            {0: "batch", 1: "total"},
            {0: "batch", 1: "length"},
            [(cached, cached) for _ in layers],
        ),
        input_names=["input_ids", "attention_mask", "position_ids", *_names(PAST, layers)],
        output_names=["logits", *_names(PRESENT, layers)],
    )
    if program is None:
        raise ValueError("torch.onnx gave no program")
    program.save(file, external_data=True)


def _names(start: str, layers: Sequence[int]) -> list[str]:
    return [f"{start}.{layer}.{kind}" for layer in layers for kind in KINDS]


def _cached_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def genai_config(model: Any) -> dict[str, Any]:
    """What onnxruntime-genai has to know of an exported model: https://onnxruntime.ai/docs/genai/reference/config."""
    config, generation = model.config, model.generation_config
    ends = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    pad = next((token for token in (generation.pad_token_id, config.pad_token_id, first, 0) if token is not None), 0)
    tensors = {f"{kind}_names": kind for kind in KINDS}
    return {
        "model": {
            "type": "llama",  # any decoder with a cache of keys and values is computed like it
            "bos_token_id": config.bos_token_id or 0,
            "eos_token_id": ends if ends is not None else [],
            "pad_token_id": pad,
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "filename": MODEL,
                "session_options": {"provider_options": []},
                "hidden_size": config.hidden_size,
                "head_size": _head_size(config),
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": _cached_heads(config),
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")}
                | {f"past_{name}": f"{PAST}.%d.{kind}" for name, kind in tensors.items()},
                "outputs": {"logits": "logits"}
                | {f"present_{name}": f"{PRESENT}.%d.{kind}" for name, kind in tensors.items()},
            },
        },
        "search": {
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": False,  # the graph gives a new cache at each step
            "do_sample": bool(generation.do_sample),
        }
        | {
            name: value
            for name in ("temperature", "top_p", "top_k", "repetition_penalty")
            if (value := getattr(generation, name, None)) is not None
        },
    }


def _compare(model: Any, folder: Path, prompt: list[int]) -> None:
    """Raises ValueError if the exported model writes other tokens than the model."""
    import onnxruntime_genai as genai  # noqa: PLC0415

    with torch.inference_mode():
        ids = torch.tensor([prompt])
        wanted = model.generate(ids, max_new_tokens=TRIED_TOKENS, do_sample=False)[0].tolist()
    exported = genai.Model(str(folder))
    params = genai.GeneratorParams(exported)
    params.set_search_options(do_sample=False, max_length=len(prompt) + TRIED_TOKENS)
    generator = genai.Generator(exported, params)
    for piece in (prompt[:2], prompt[2:]):
        generator.append_tokens(piece)
    while not generator.is_done():
        generator.generate_next_token()
    written = generator.get_sequence(0).tolist()
    if written != wanted:
        raise ValueError(f"the exported model writes {written}, and the model {wanted}: it cannot be exported")
