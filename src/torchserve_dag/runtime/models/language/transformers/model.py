"""A Hugging Face model as the engine `transformers` needs it: weights, tokenizer, chat template, LoRA adapters."""

from __future__ import annotations

import base64
import binascii
import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from torchserve_dag.runtime.compute.placement import Placement
from torchserve_dag.runtime.data import photos
from torchserve_dag.runtime.messages import Chat, InputError, Prompt
from torchserve_dag.runtime.models.language.chat_template import ChatTemplate
from torchserve_dag.runtime.models.language.settings import LanguageSettings
from torchserve_dag.runtime.models.language.transformers.sampler import DefaultSampling

LONGEST_CONTEXT = 8192
"""The context where the settings name none, and the model was trained with a longer one."""
MOST_CHARACTERS_A_TOKEN = 100
"""A text with more for each token of the context is refused before it is split into tokens."""
MOST_PHOTOS = 8
"""In a chat."""
MOST_PIXELS = 20_000_000
"""Of a photo in a chat: the model sees far fewer."""


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """A prompt as the model takes it."""

    tokens: list[int]
    photos: dict[str, torch.Tensor]
    """What else the model takes of photos, by its parameters' names."""


class HubModel:
    """A language model of the hub, or of a folder or GGUF file below `weights/`, with what belongs to it."""

    def __init__(self, folder: Path, settings: LanguageSettings, placement: Placement) -> None:
        """Raises ValueError, OSError for a model that cannot be read."""
        local = folder / settings.model
        self.name = str(local) if local.exists() else settings.model
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
        self.tokenizer("settles its settings: changing them while other threads read fails")

    @cached_property
    def sees_photos(self) -> bool:
        return hasattr(self.model.config, "vision_config")

    @cached_property
    def processor(self) -> Any:
        """Of a model that sees photos: text and photos to its inputs."""
        import transformers  # noqa: PLC0415 (only this engine needs it)

        kind: Any = transformers.AutoProcessor
        return kind.from_pretrained(self.name)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer  # noqa: PLC0415 (as above)

        return AutoTokenizer.from_pretrained(**_where(self.name))

    @cached_property
    def template(self) -> ChatTemplate | None:
        """None for a model that was not trained for chats."""
        if self._settings.chat_template:
            source = (self._folder / self._settings.chat_template).read_text("utf-8")
        else:
            source = (self.sees_photos and self.processor.chat_template) or self.tokenizer.chat_template
        tokens = {f"{name}_token": getattr(self.tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
        return ChatTemplate(source, photos=self.sees_photos, **tokens) if source else None

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        end = self.model.generation_config.eos_token_id
        end = self.tokenizer.eos_token_id if end is None else end
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

    def inputs(self, request: Chat | Prompt) -> ModelInputs:
        """A request's prompt. Raises InputError."""
        images = _images(request)
        if isinstance(request, Prompt):
            text, special = request.prompt, True
        elif self.template is None:
            raise InputError("messages: the model has no chat template; send a prompt, or set chat_template.")
        else:
            text, special = self.template(request), False
        if len(text) > self.context * MOST_CHARACTERS_A_TOKEN:
            message = f"The prompt has {len(text):,} characters; the model's context holds {self.context:,} tokens."
            raise InputError(message, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        if images:
            taken = dict(self.processor(text=text, images=images, return_tensors="pt", add_special_tokens=special))
            tokens = taken.pop("input_ids")[0].tolist()
            taken.pop("attention_mask", None)
            return ModelInputs(tokens, taken)
        tokens = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        if not tokens:
            raise InputError("prompt: it has no token; send a text.")
        return ModelInputs(tokens, {})

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def decode_with_marks(self, tokens: Sequence[int]) -> str:
        """With special tokens, among which some models have the marks of a call of a tool."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

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
        local = self._folder / path
        model = self._load(str(local) if local.exists() else path)
        if model.config.get_text_config().vocab_size != self.vocabulary:
            raise ValueError(f"the draft {path} has another vocabulary than {self._settings.model}")
        return model

    def _load(self, name: str) -> Any:
        import transformers  # noqa: PLC0415 (as above)

        where = _where(name)
        sees = "gguf_file" not in where and hasattr(transformers.AutoConfig.from_pretrained(name), "vision_config")
        kind: Any = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
        model, report = kind.from_pretrained(**where, dtype=self.dtype, output_loading_info=True)
        if report["missing_keys"]:  # transformers fills them with random numbers, and writes at random
            raise ValueError(f"{name} is no language model: it lacks {min(report['missing_keys'])}")
        return model.to(self.device).eval().requires_grad_(requires_grad=False)


def greedy(**limits: Any) -> Any:
    """A generation config that takes the most probable token: what a request says, its `Sampler` does."""
    import transformers  # noqa: PLC0415 (as above)

    make: Any = transformers.GenerationConfig
    return make(do_sample=False, **limits)


def _where(name: str) -> dict[str, str]:
    """What `from_pretrained` is called with."""
    if name.endswith(".gguf"):
        return {"pretrained_model_name_or_path": str(Path(name).parent), "gguf_file": Path(name).name}
    return {"pretrained_model_name_or_path": name}


def _images(request: Chat | Prompt) -> list[Image.Image]:
    """The photos of a chat, in order. Raises InputError."""
    if isinstance(request, Prompt):
        return []
    parts = (part for message in request.messages if isinstance(message.content, list) for part in message.content)
    urls = [part.image_url.url for part in parts if part.image_url]
    if len(urls) > MOST_PHOTOS:
        raise InputError(f"messages: the chat has {len(urls)} photos; send at most {MOST_PHOTOS}.")
    return [_image(url) for url in urls]


def _image(url: str) -> Image.Image:
    head, _, data = url.partition(",")
    if not head.endswith(";base64"):
        raise InputError("messages: a photo's URL is data:image/jpeg;base64,… with the photo in base64.")
    try:
        body = base64.b64decode(data, validate=True)
    except binascii.Error:
        raise InputError("messages: a photo's base64 is damaged; encode the file again.") from None
    return photos.decode(body, MOST_PIXELS).image
