"""The function of chat_with_fallback: what is answered where no model can."""

from __future__ import annotations

from torchserve_dag import Chat, Prompt, TextChunk, Usage

CANNED = "No model can answer at the moment. Please try again in a minute."


def canned(chat: Chat | Prompt) -> TextChunk:  # noqa: ARG001 (a fallback has the input of what it stands in for)
    return TextChunk(CANNED, finish_reason="stop", usage=Usage(), served_by="canned answer")
