"""The tokenizer's side of the engine `transformers`: requests as tokens, and as what a model sees of photos."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from torchserve_dag.runtime.data import data_url
from torchserve_dag.runtime.messages import Chat, InputError, Prompt
from torchserve_dag.runtime.models.language.chat_template import ChatTemplate
from torchserve_dag.runtime.models.language.engine import PromptTokens
from torchserve_dag.runtime.models.language.settings import LanguageSettings

MOST_PHOTOS = 8
"""In a chat."""
MOST_PIXELS = 20_000_000
"""Of a photo in a chat: the model sees far fewer."""


def load_prompts(folder: Path, settings: LanguageSettings) -> HubPrompts:
    """What reads the prompts of a model of the hub, or below `folder`. Raises ValueError, OSError."""
    return HubPrompts(folder, settings)


class HubPrompts:
    """See PromptReader."""

    def __init__(self, folder: Path, settings: LanguageSettings) -> None:
        self._name, self._folder, self._settings = model_name(folder, settings.model), folder, settings
        self.template  # noqa: B018 (read now, so that one that cannot be read fails the loading)
        self.tokenizer("settles its settings: changing them while other threads read fails")

    @cached_property
    def sees_photos(self) -> bool:
        return sees_photos(self._name)

    @cached_property
    def processor(self) -> Any:
        """Of a model that sees photos: text and photos to its inputs."""
        import transformers  # noqa: PLC0415 (only this engine needs it)

        kind: Any = transformers.AutoProcessor
        return kind.from_pretrained(self._name)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer  # noqa: PLC0415 (as above)

        return AutoTokenizer.from_pretrained(**hub_place(self._name))

    @cached_property
    def template(self) -> ChatTemplate | None:
        """None for a model that was not trained for chats."""
        if self._settings.chat_template:
            source = (self._folder / self._settings.chat_template).read_text("utf-8")
        else:
            source = (self.sees_photos and self.processor.chat_template) or self.tokenizer.chat_template
        tokens = {f"{name}_token": getattr(self.tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
        return ChatTemplate(source, photos=self.sees_photos, **tokens) if source else None

    def __call__(self, request: Chat | Prompt) -> PromptTokens:
        images = _images(request)
        if isinstance(request, Prompt):
            text, special = request.prompt, True
        elif self.template is None:
            raise InputError("messages: the model has no chat template; send a prompt, or set chat_template.")
        else:
            text, special = self.template(request), False
        if images:
            taken = dict(self.processor(text=text, images=images, return_tensors="pt", add_special_tokens=special))
            tokens = taken.pop("input_ids")[0].tolist()
            taken.pop("attention_mask", None)
            return PromptTokens(tokens, taken)
        tokens = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        if not tokens:
            raise InputError("prompt: it has no token; send a text.")
        return PromptTokens(tokens)


def model_name(folder: Path, model: str) -> str:
    """The path of a model below `folder`, or else its name on the hub."""
    local = folder / model
    return str(local) if local.exists() else model


def sees_photos(name: str) -> bool:
    """Whether it is a vision-language model."""
    import transformers  # noqa: PLC0415 (only this engine needs it)

    where = hub_place(name)
    return "gguf_file" not in where and hasattr(transformers.AutoConfig.from_pretrained(**where), "vision_config")


def hub_place(name: str) -> dict[str, str]:
    """What `from_pretrained` is called with."""
    if name.endswith(".gguf"):
        return {"pretrained_model_name_or_path": str(Path(name).parent), "gguf_file": Path(name).name}
    return {"pretrained_model_name_or_path": name}


def _images(request: Chat | Prompt) -> list[Image.Image]:
    """The photos of a chat, in order. Raises InputError."""
    if isinstance(request, Prompt):
        return []
    urls = data_url.photo_urls(request)
    if len(urls) > MOST_PHOTOS:
        raise InputError(f"messages: the chat has {len(urls)} photos; send at most {MOST_PHOTOS}.")
    return [data_url.decode_photo(url, MOST_PIXELS).image for url in urls]
