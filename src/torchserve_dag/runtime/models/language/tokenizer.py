"""A model's own tokenizer and chat template, by transformers: for engines that take tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchserve_dag.runtime.messages import Chat, ChatMessage, InputError, Prompt


class Tokenizer:
    """Requests as tokens, and tokens as text. Its methods may be called from any thread."""

    def __init__(self, folder: Path, template: Path | None = None) -> None:
        """The tokenizer of the model in `folder`; `template` is another chat template. Raises OSError, ValueError."""
        from transformers import AutoTokenizer  # noqa: PLC0415

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        if template:
            self._tokenizer.chat_template = template.read_text("utf-8")

    def __call__(self, request: Chat | Prompt) -> list[int]:
        """The prompt's tokens; at least one. Raises InputError."""
        if isinstance(request, Prompt):
            tokens: list[int] = self._tokenizer(request.prompt)["input_ids"]
        else:
            tokens = self._tokenizer(self._text(request), add_special_tokens=False)["input_ids"]
        if not tokens:
            raise InputError("The prompt is empty; send at least one word.")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without the special ones."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _text(self, chat: Chat) -> str:
        """A chat as the model was trained to read it, with the beginning of the assistant's answer."""
        if not self._tokenizer.chat_template:
            raise InputError("messages: this model has no chat template; send a prompt.")
        messages = [_message(message) for message in chat.messages]
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template raises whatever it likes, at roles that it does not know for example
            raise InputError(f"messages: the model's chat template refuses them: {error}.") from error
        return text


def _message(message: ChatMessage) -> dict[str, str]:
    """A message as templates know it: they know no developers."""
    return {"role": "system" if message.role == "developer" else message.role, "content": message.text}
