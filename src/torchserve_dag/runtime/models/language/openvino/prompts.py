"""The tokenizer's side of the engine `openvino`: requests as tokens, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchserve_dag.runtime.messages import Chat, Prompt
from torchserve_dag.runtime.models.language.chat_template import ChatTemplate
from torchserve_dag.runtime.models.language.engine import PromptTokens
from torchserve_dag.runtime.models.language.settings import LanguageSettings

_PLAIN_CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
"""For a model without a template of its own."""


def load_prompts(folder: Path, settings: LanguageSettings) -> OpenVinoPrompts:
    """What reads the prompts of the model below `folder`. Raises ValueError."""
    import openvino_genai  # noqa: PLC0415 (only this engine needs it)

    path = folder / settings.model
    if not path.exists():
        raise ValueError(f"there is no {settings.model} in {folder}")
    try:
        tokenizer = openvino_genai.Tokenizer(path)
    except RuntimeError as error:
        raise ValueError(f"OpenVINO cannot read the tokenizer of {settings.model}: {last_line(error)}") from None
    return OpenVinoPrompts(tokenizer, folder, settings)


class OpenVinoPrompts:
    """See PromptReader."""

    def __init__(self, tokenizer: Any, folder: Path, settings: LanguageSettings) -> None:
        """`tokenizer`: OpenVINO GenAI's. Raises ValueError for a chat template that cannot be read."""
        template = (folder / settings.chat_template).read_text("utf-8") if settings.chat_template else None
        self._tokenizer = tokenizer
        self._template = ChatTemplate(
            template or tokenizer.chat_template or _PLAIN_CHAT,
            bos_token=tokenizer.get_bos_token(),
            eos_token=tokenizer.get_eos_token(),
        )

    def __call__(self, request: Chat | Prompt) -> PromptTokens:
        text = self._template(request) if isinstance(request, Chat) else request.prompt
        ids = self._tokenizer.encode(text, add_special_tokens=isinstance(request, Prompt)).input_ids
        return PromptTokens(ids.data[0].tolist())


def as_tensor(prompt: PromptTokens) -> Any:
    """The tokens as OpenVINO takes them: int64 [1, tokens]."""
    import numpy as np  # noqa: PLC0415 (as OpenVINO)
    import openvino  # noqa: PLC0415 (only this engine needs it)

    return openvino.Tensor(np.array([prompt.tokens], dtype=np.int64))


def last_line(error: BaseException) -> str:
    """The line of OpenVINO's error that says what is wrong."""
    return next(iter(str(error).strip().splitlines()[-1:]), type(error).__name__)
