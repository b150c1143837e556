"""Text that is held back until it has been judged: an answer in pieces, each released with its own verdict."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torchserve_dag import Chat, Choice, InputError, Moderation, Text, TextChunk, ToolCall

MOST = 240
"""Characters of a piece: a sentence that does not end is cut here, between two words if it has any."""
CONTEXT = 80
"""Characters before a piece that are judged with it, so that what was cut in two is seen whole."""

_END = re.compile(
    r"""[.!?…؟۔।][)\]"'’”»]*(?=\s)|[。！？]|(?<=\S)(?=[^\S\n]*\n)"""  # noqa: RUF001 (the full stops of other scripts)
)
"""The end of a sentence, or of a line; the white space after it belongs to the next piece."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer, which is released as a whole or not at all."""

    checked: Text
    """What is judged: all that the piece says, after the end of what was said before."""
    chunk: TextChunk
    """What is released."""


def prompt(chat: Chat) -> Text:
    """What the chat says, to be judged. Refuses what could not be released piece by piece."""
    if (chat.n or 1) > 1:
        raise InputError("n: a moderated chat has one answer at a time; leave n out, and ask again for another.")
    if chat.logprobs:
        raise InputError("logprobs: they name tokens that nobody has checked; leave them out.")
    contents = [message.content for message in chat.messages if isinstance(message.content, list)]
    if any(part.image_url for parts in contents for part in parts):
        raise InputError("messages: photos are not checked here; send texts only.")
    calls = [call for message in chat.messages for call in message.tool_calls or ()]
    return Text("\n".join([*(message.text for message in chat.messages), *map(_said_by, calls)]))


async def pieces(answer: AsyncIterator[TextChunk]) -> AsyncIterator[Piece]:
    """The answer in sentences, or parts of them; calls of tools whole, at its end, with whatever its end says."""
    before, held, last, called = "", "", TextChunk(), Choice()
    async for chunk in answer:
        held += chunk.text
        for part in chunk.tool_calls or ():
            called.tool_call(part)
        last = TextChunk(
            finish_reason=chunk.finish_reason or last.finish_reason,
            usage=chunk.usage or last.usage,
            served_by=chunk.served_by or last.served_by,
        )
        while cut := _cut(held):
            yield Piece(Text(_context(before) + held[:cut]), TextChunk(held[:cut]))
            before, held = (before + held[:cut])[-2 * CONTEXT :], held[cut:]
    said = "\n".join([_context(before) + held, *map(_said_by, called.tool_calls)])
    yield Piece(Text(said), replace(last, text=held, tool_calls=called.tool_calls or None))


async def released(
    verdict: Moderation, pieces: AsyncIterator[Piece], verdicts: AsyncIterator[Moderation]
) -> AsyncIterator[TextChunk]:
    """The pieces that are not flagged, up to the first that is."""
    if verdict.flagged:
        yield await _ended(f"This cannot be answered: it was flagged as {verdict.named}.", pieces)
        return
    async for piece in pieces:
        if (await anext(verdicts)).flagged:
            yield await _ended("", pieces, piece)
            return
        yield piece.chunk


async def _ended(text: str, pieces: AsyncIterator[Piece], last: Piece | None = None) -> TextChunk:
    """The last chunk of an answer that was flagged, with what the generation has cost, if it had come to its end."""
    async for piece in pieces:  # which ends at once: the verdict has ended the answer
        last = piece
    known = last.chunk if last else TextChunk()
    return TextChunk(text, finish_reason="content_filter", usage=known.usage, served_by=known.served_by)


def _cut(held: str) -> int:
    """How much of the text is a piece; 0 while it may go on."""
    if end := _END.search(held, 0, MOST):
        return end.end()
    if len(held) <= MOST:
        return 0
    return held.rfind(" ", 1, MOST) if " " in held[1:MOST] else MOST


def _context(before: str) -> str:
    """The end of what was said, from the beginning of a word if there is one."""
    end = before[-CONTEXT:]
    return end[end.find(" ") + 1 :] if len(before) > CONTEXT else end


def _said_by(call: ToolCall) -> str:
    """What a call says: its name, its arguments as they are, and the texts in them, which JSON may have escaped."""
    arguments = call.function.arguments or ""
    try:
        texts = list(_texts(json.loads(arguments)))
    except (ValueError, RecursionError):
        texts = []
    return "\n".join([call.function.name or "", arguments, *texts])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield name
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
