"""A Hugging Face model as the engine `transformers` needs it: weights, tokenizer, chat template, LoRA adapters."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from torchserve_dag.runtime.compute.placement import Placement
from torchserve_dag.runtime.models.language.settings import LanguageSettings
from torchserve_dag.runtime.models.language.transformers.prompts import (
    HubPrompts,
    hub_place,
    model_name,
    sees_photos,
)
from torchserve_dag.runtime.models.language.transformers.sampler import DefaultSampling

LONGEST_CONTEXT = 8192
"""The context where the settings name none, and the model was trained with a longer one."""


class HubModel:
    """A language model of the hub, or of a folder or GGUF file below `weights/`, with what belongs to it."""

    def __init__(self, folder: Path, settings: LanguageSettings, placement: Placement) -> None:
        """Raises ValueError, OSError for a model that cannot be read."""
        self.name = model_name(folder, settings.model)
        self._folder, self._settings = folder, settings
        self.device = placement.device
        self.dtype = torch.bfloat16 if placement.precision == "bfloat16" and not settings.exact else torch.float32
        self.model = self._load(self.name)
        config = self.model.config.get_text_config()
        trained = getattr(config, "max_position_embeddings", None) or LONGEST_CONTEXT
        self.context = settings.context or min(trained, LONGEST_CONTEXT)
        if self.context > trained:
            raise ValueError(f"context is {self.context}, and {settings.model} was trained with {trained} tokens")
        self.vocabulary: int = config.vocab_size
        self.prompts = HubPrompts(folder, settings)
        self._tokenizer: Any = self.prompts.tokenizer

    @property
    def sees_photos(self) -> bool:
        return self.prompts.sees_photos

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        end = self.model.generation_config.eos_token_id
        end = self._tokenizer.eos_token_id if end is None else end
        return frozenset() if end is None else frozenset([end] if isinstance(end, int) else end)

    @cached_property
    def sampling(self) -> DefaultSampling:
        """How it writes by default: the most probable token, if its generation config does not say that it samples."""
        config = self.model.generation_config
        if not config.do_sample:
            return DefaultSampling()
        return DefaultSampling(
            1.0 if config.temperature is None else config.temperature,
            1.0 if config.top_p is None else config.top_p,
            config.top_k or 0,
        )

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def decode_with_marks(self, tokens: Sequence[int]) -> str:
        """With special tokens, among which some models have the marks of a call of a tool."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def with_adapter(self, path: str) -> Any:
        """The model with a LoRA adapter: its own modules around the same weights."""
        from peft import PeftModel  # noqa: PLC0415 (only for adapters)

        shared = {id(tensor): tensor for tensor in itertools.chain(self.model.parameters(), self.model.buffers())}
        adapted = PeftModel.from_pretrained(
            copy.deepcopy(self.model, shared), str(self._folder / path), autocast_adapter_dtype=False
        )
        return adapted.to(self.device, self.dtype).eval().requires_grad_(requires_grad=False).get_base_model()

    def draft(self, path: str) -> Any:
        """A model that drafts tokens for this one. Raises ValueError if it has another vocabulary."""
        model = self._load(model_name(self._folder, path))
        if model.config.get_text_config().vocab_size != self.vocabulary:
            raise ValueError(f"the draft {path} has another vocabulary than {self._settings.model}")
        return model

    def _load(self, name: str) -> Any:
        import transformers  # noqa: PLC0415 (as above)

        sees = sees_photos(name)
        kind: Any = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
        model, report = kind.from_pretrained(**hub_place(name), dtype=self.dtype, output_loading_info=True)
        if report["missing_keys"]:  # transformers fills them with random numbers, and writes at random
            raise ValueError(f"{name} is no language model: it lacks {min(report['missing_keys'])}")
        return model.to(self.device).eval().requires_grad_(requires_grad=False)


def greedy(**limits: Any) -> Any:
    """A generation config that takes the most probable token: what a request says, its `Sampler` does."""
    import transformers  # noqa: PLC0415 (as above)

    make: Any = transformers.GenerationConfig
    return make(do_sample=False, **limits)
