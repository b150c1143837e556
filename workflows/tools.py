"""A chat in which the model may have functions called, until it answers."""

from __future__ import annotations

from torchserve_dag import Chat, InputError, TextChunk
from workflows.tools_round import Dialogue

MOST_TOKENS = 1024
"""That the model may write in all rounds together, where the client gives no limit."""


def begin(chat: Chat) -> Dialogue:
    """Refuses tools of the client's: nobody here could call them."""
    if chat.tools or chat.tool_choice:
        name = "tools" if chat.tools else "tool_choice"
        raise InputError(f"{name}: this model calls functions of its own; leave it out, or call a model without any.")
    if (chat.n or 1) > 1:
        raise InputError("n: a model that calls functions gives one answer; leave it out.")
    return Dialogue(chat, chat.most_tokens or MOST_TOKENS)


def answer(dialogue: Dialogue) -> TextChunk:
    """What the model says at the end. Having functions called in every round is no answer, 422."""
    if dialogue.finish_reason is None:
        message = f"The model has not answered after {dialogue.rounds} rounds of calls: ask for less at a time."
        raise InputError(message, 422)
    return TextChunk(
        dialogue.answer, finish_reason=dialogue.finish_reason, usage=dialogue.usage, served_by=dialogue.served_by
    )
