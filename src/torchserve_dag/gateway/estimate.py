"""How many tokens a request is counted as before anything runs, and an answer that does not say what it has cost."""

from __future__ import annotations

import json

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.messages import Chat, Prompt, Text

BYTES_PER_TOKEN = 4
PHOTO = 256
"""Tokens of a photo."""
ANSWER = 256
"""Tokens of an answer whose limit the client leaves open."""


def prompt_tokens(message: Chat | Prompt | Text) -> int:
    if isinstance(message, Text):
        return of_text(message.text)
    if isinstance(message, Prompt):
        return of_text(message.prompt)
    parts = [part for one in message.messages if isinstance(one.content, list) for part in one.content]
    photos = sum(part.image_url is not None for part in parts)
    tools = json.dumps(plain.flatten(message.tools)) if message.tools else ""
    return of_text("".join(one.text for one in message.messages) + tools) + PHOTO * photos


def of_text(text: str) -> int:
    return max(1, len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)


def answer_tokens(message: Chat | Prompt | Text) -> int:
    return 0 if isinstance(message, Text) else (message.n or 1) * (message.most_tokens or ANSWER)
