"""A model's own tokenizer and chat template, for engines that take tokens."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from torchserve_dag.runtime.messages import Chat, InputError, Prompt
from torchserve_dag.runtime.models.language.chat_template import ChatTemplate

MOST_CHARACTERS_A_TOKEN = 100
"""A text with more for each token of the context is refused before it is split into tokens."""


class Tokenizer:
    """Requests as tokens, and tokens as text. Its methods may be called from any thread."""

    def __init__(self, folder: Path, context: int, template: Path | None = None) -> None:
        """The tokenizer of the model in `folder`; `template` is another chat template. Raises OSError, ValueError."""
        from transformers import AutoTokenizer  # noqa: PLC0415

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._tokenizer("settles its settings: changing them while other threads read fails")
        self._longest = context * MOST_CHARACTERS_A_TOKEN
        source = template.read_text("utf-8") if template else self._tokenizer.chat_template
        begin, end = self._tokenizer.bos_token, self._tokenizer.eos_token
        self._template = ChatTemplate(source, bos_token=begin, eos_token=end) if source else None
        self._last: tuple[Chat | Prompt, list[int]] | None = None

    def __call__(self, request: Chat | Prompt) -> list[int]:
        """The prompt's tokens; at least one. Raises InputError."""
        last = self._last
        if last and last[0] is request:  # it was counted before it is started
            return last[1]
        text = self._chat(request) if isinstance(request, Chat) else request.prompt
        if len(text) > self._longest:
            what = f"The prompt has {len(text):,} characters, too many for the model's context: shorten it."
            raise InputError(what, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        special = isinstance(request, Prompt)  # of a chat, the template writes them
        tokens: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        if not tokens:
            raise InputError("The prompt is empty; send at least one word.")
        self._last = request, tokens
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without the special ones."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _chat(self, chat: Chat) -> str:
        if self._template is None:
            raise InputError("messages: this model has no chat template; send a prompt.")
        return self._template(chat)
